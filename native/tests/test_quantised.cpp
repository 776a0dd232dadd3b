// The same tokens alone and together, with quantised weights: rows that are alone go through other
// kernels than rows of a batch. Prints what the CPU has, which says which ones.
// Arguments: where to write, llama.cpp's folder, the embedded model.
#include "check.hpp"

#include <string>

namespace {

// What the embedded model was trained on: where it is sure no rounding decides.
const char * const QUESTIONS[] = {
    "Copy: hello", "What is 17 + 25?", "Write in capitals: batch", "Reverse: drawer", "What is 3 + 4?",
};
constexpr int32_t N_SEQ = 5;

struct type {
    const char * name;
    llama_ftype  file_type;
};

const type TYPES[] = {
    {"q8_0", LLAMA_FTYPE_MOSTLY_Q8_0},
    {"q4_0", LLAMA_FTYPE_MOSTLY_Q4_0},
    {"q4_k", LLAMA_FTYPE_MOSTLY_Q4_K_M}, // with Q6_K
    {"iq4_nl", LLAMA_FTYPE_MOSTLY_IQ4_NL},
};

std::vector<llama_token> prompt_of(const fixture & f, int32_t seq) {
    const std::string text = std::string("<|im_start|>user\n") + QUESTIONS[seq] +
                             "<|im_end|>\n<|im_start|>assistant\n";
    std::vector<llama_token> tokens(text.size());
    const int32_t n = llama_tokenize(llama_model_get_vocab(f.model), text.c_str(), (int32_t) text.size(),
                                     tokens.data(), (int32_t) tokens.size(), false, true);
    CHECK(n > 0);
    tokens.resize(n);
    return tokens;
}

// What sequences first..last-1 answer when each one's prompt is computed while those before it decode.
std::vector<std::vector<llama_token>> answers(fixture & f, int32_t first, int32_t last) {
    std::vector<std::vector<llama_token>> found(last - first);
    plb_sampling greedy = plb_sampling_default();
    greedy.temperature  = 0;
    greedy.max_tokens   = 12;
    int32_t n_begun = first;
    for (bool any = true; any;) {
        int32_t n_rows = 0;
        for (int32_t seq = first; seq < n_begun; ++seq) {
            plb_slot_info info = {};
            CHECK_EQ(plb_slot_get_info(f.engine, seq, &info), PLB_OK);
            if (info.active) {
                f.row(n_rows++, info.next_token, info.next_pos, seq, PLB_ROW_SAMPLE);
            }
        }
        if (n_begun < last) {
            CHECK_EQ(plb_slot_set(f.engine, n_begun, &greedy, nullptr, 0), PLB_OK);
            const auto tokens = prompt_of(f, n_begun);
            f.prompt(n_rows, tokens, n_begun++);
            n_rows += (int32_t) tokens.size();
        }
        any = n_rows > 0;
        if (any) {
            CHECK_EQ(plb_step(f.engine, n_rows), PLB_OK);
            for (int32_t i = 0; i < f.views.info->n_results; ++i) {
                found[f.views.results[i].seq - first].push_back(f.views.results[i].token);
            }
        }
    }
    for (int32_t seq = first; seq < last; ++seq) {
        CHECK_EQ(plb_slot_clear(f.engine, seq), PLB_OK);
    }
    llama_memory_clear(llama_get_memory(f.ctx), true);
    return found;
}

void alone_and_together(const std::string & file) {
    fixture f(file.c_str(), 512, N_SEQ, plb_engine_default_params());
    const auto together = answers(f, 0, N_SEQ);
    for (int32_t seq = 0; seq < N_SEQ; ++seq) {
        CHECK(together[seq].size() > 1);
        CHECK(answers(f, seq, seq + 1)[0] == together[seq]);
    }
}

} // namespace

int main(int argc, char ** argv) {
    const std::string tiny = model_path(argc, argv), source = argc > 3 ? argv[3] : "";
    CHECK(!source.empty());
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    printf("%s\n", llama_print_system_info());
    for (const type & type : TYPES) {
        const std::string file = tiny + "." + type.name;
        llama_model_quantize_params params = llama_model_quantize_default_params();
        params.ftype            = type.file_type;
        params.allow_requantize = true;
        params.nthread          = 1;
        CHECK_EQ(llama_model_quantize(source.c_str(), file.c_str(), &params), 0);
        alone_and_together(file);
        CHECK_EQ(remove(file.c_str()), 0);
        printf("%s: the same\n", type.name);
    }
    return 0;
}
