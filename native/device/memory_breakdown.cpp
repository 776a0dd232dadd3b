// What a context takes up, by buffer type (llama-ext.h, libllama's C++ header for what is not yet in
// its C interface). With a model that was loaded with no_alloc these are sizes that would be taken.
#include "plb.h"

#include "llama-ext.h"

#include <cstring>
#include <exception>

namespace {

void copy(char (&to)[64], const char * from) {
    std::strncpy(to, from != nullptr ? from : "", sizeof(to) - 1);
    to[sizeof(to) - 1] = '\0';
}

} // namespace

int32_t plb_memory_breakdown(const struct llama_context * ctx, plb_memory_part * parts, int32_t n_parts) {
    if (ctx == nullptr || n_parts < 0 || (parts == nullptr && n_parts > 0)) {
        return PLB_E_ARGUMENT;
    }
    try {
        int32_t n = 0;
        for (const auto & [type, bytes] : llama_get_memory_breakdown(ctx)) {
            if (bytes.total() == 0) {
                continue;
            }
            if (n < n_parts) {
                plb_memory_part & part   = parts[n];
                ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
                copy(part.buffer_type, ggml_backend_buft_name(type));
                copy(part.device, device != nullptr ? ggml_backend_dev_name(device) : nullptr);
                part.host    = ggml_backend_buft_is_host(type) ? 1 : 0;
                part.model   = (int64_t) bytes.model;
                part.context = (int64_t) bytes.context;
                part.compute = (int64_t) bytes.compute;
            }
            n++;
        }
        return n;
    } catch (const std::exception &) {
        return PLB_E_EXCEPTION;
    }
}
