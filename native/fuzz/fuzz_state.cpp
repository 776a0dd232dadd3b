// The state of a sequence, as libllama reads it: taken or refused, and the context goes on.
#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const time_limit limit;
    fixture & f = shared_fixture();
    llama_memory_t memory = llama_get_memory(f.ctx);
    const size_t n_read = plb_state_seq_set(f.ctx, data, size, 0);
    CHECK(n_read <= size);
    llama_memory_clear(memory, true);
    f.row(0, 1, 0, 1, 0);
    CHECK_EQ(plb_step(f.engine, 1), PLB_OK);
    llama_memory_clear(memory, true);
    return 0;
}
