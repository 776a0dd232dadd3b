// Functions of the CPU backend when it is a library chosen at run time (ggml's GGML_BACKEND_DL).
#include "device/cpu_symbol.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <string>

#include <dlfcn.h>

namespace {

std::string folder_of(const void * address) {
    Dl_info info = {};
    if (!dladdr(address, &info) || !info.dli_fname) {
        return "";
    }
    const std::string path = info.dli_fname;
    return path.substr(0, path.rfind('/'));
}

void * open_cpu_backend() {
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("CPU");
    if (!reg) {
        const std::string folder = folder_of(reinterpret_cast<const void *>(&plb_cpu_symbol)) + "/lib";
        ggml_backend_load_all_from_path(folder.c_str());
        reg = ggml_backend_reg_by_name("CPU");
    }
    // Any function of the backend tells which library it is.
    void * known = reg ? ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads") : nullptr;
    Dl_info info = {};
    if (!known || !dladdr(known, &info)) {
        GGML_ABORT("pyllamabatch: no CPU backend is loaded; call ggml_backend_load_all_from_path");
    }
    return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
}

}  // namespace

void * plb_cpu_symbol(const char * name) {
    static void * library = open_cpu_backend();
    void * found = library ? dlsym(library, name) : nullptr;
    if (!found) {
        GGML_ABORT("pyllamabatch: the CPU backend has no function %s", name);
    }
    return found;
}
