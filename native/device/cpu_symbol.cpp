// Functions of the CPU backend when it is a library chosen at run time (ggml's GGML_BACKEND_DL).
#include "device/cpu_symbol.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <string>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace {

#ifdef _WIN32

// The library that `address` is in, loaded already; it stays as long as the process. Null: none.
HMODULE library_of(const void * address) {
    HMODULE found = nullptr;
    GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_PIN,
                       static_cast<LPCWSTR>(address), &found);
    return found;
}

std::string path_of(const void * address) { // UTF-8, as ggml takes it
    wchar_t     wide[4096]; // more than a path may have
    const DWORD n = GetModuleFileNameW(library_of(address), wide, 4096);
    std::string path(3 * (size_t) n, '\0');
    path.resize((size_t) WideCharToMultiByte(CP_UTF8, 0, wide, (int) n, path.data(), (int) path.size(),
                                             nullptr, nullptr));
    return path;
}

void * symbol_of(HMODULE library, const char * name) {
    return reinterpret_cast<void *>(GetProcAddress(library, name));
}

#else

std::string path_of(const void * address) {
    Dl_info info = {};
    return dladdr(address, &info) && info.dli_fname ? info.dli_fname : "";
}

void * library_of(const void * address) { return dlopen(path_of(address).c_str(), RTLD_NOW | RTLD_NOLOAD); }

void * symbol_of(void * library, const char * name) { return dlsym(library, name); }

#endif

auto open_cpu_backend() {
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("CPU");
    if (!reg) {
        const std::string path   = path_of(reinterpret_cast<const void *>(&plb_cpu_symbol));
        const std::string folder = path.substr(0, path.find_last_of("/\\") + 1) + "lib";
        ggml_backend_load_all_from_path(folder.c_str());
        reg = ggml_backend_reg_by_name("CPU");
    }
    // Any function of the backend tells which library it is.
    void * known = reg ? ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads") : nullptr;
    if (!known) {
        GGML_ABORT("pyllamabatch: no CPU backend is loaded; call ggml_backend_load_all_from_path");
    }
    return library_of(known);
}

}  // namespace

void * plb_cpu_symbol(const char * name) {
    static const auto library = open_cpu_backend();
    void * found = library ? symbol_of(library, name) : nullptr;
    if (!found) {
        GGML_ABORT("pyllamabatch: the CPU backend has no function %s", name);
    }
    return found;
}
