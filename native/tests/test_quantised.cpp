// The same tokens alone and together, with quantised weights: rows that are alone go through other
// kernels than rows of a batch. Prints what the CPU has, which says which ones. And the kernels of
// vendor/patches/cpu-few-columns.patch and cpu-k-quants.patch by themselves.
// Arguments: where to write, llama.cpp's folder, the embedded model.
#include "check.hpp"

#include <cmath>
#include <cstring>
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <string>

namespace {

// What the embedded model was trained on: where it is sure no rounding decides.
const char * const QUESTIONS[] = {
    "Copy: hello", "What is 17 + 25?", "Write in capitals: batch", "Reverse: drawer", "What is 3 + 4?",
};
constexpr int32_t N_SEQ = 5;
constexpr int64_t SHORT = 64, LONG = 9216; // rows below and above 5 KB
constexpr int64_t BLOCK = 256;             // of a K-quant; long rows of these go in pieces

struct type {
    const char * name;
    llama_ftype  file_type;
};

const type TYPES[] = {
    {"q8_0", LLAMA_FTYPE_MOSTLY_Q8_0},
    {"q4_0", LLAMA_FTYPE_MOSTLY_Q4_0},
    {"q4_1", LLAMA_FTYPE_MOSTLY_Q4_1},
    {"q4_k", LLAMA_FTYPE_MOSTLY_Q4_K_M}, // with Q6_K
    {"q5_k", LLAMA_FTYPE_MOSTLY_Q5_K_M},
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
            const plb_slot_info info = f.slot(seq);
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

// The first `n` columns of a product of quantised weights, [n_rows, k], by the CPU.
std::vector<float> product(ggml_backend_t cpu, const std::vector<uint8_t> & weights, ggml_type type,
                           const std::vector<float> & columns, int64_t k, int64_t n_rows, int64_t n) {
    const ggml_init_params params = {ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true};
    ggml_context * ctx = ggml_init(params);
    ggml_tensor *  a   = ggml_new_tensor_2d(ctx, type, k, n_rows);
    ggml_tensor *  b   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, n);
    ggml_tensor *  c   = ggml_mul_mat(ctx, a, b);
    ggml_cgraph *  graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, c);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, cpu);
    ggml_backend_tensor_set(a, weights.data(), 0, weights.size());
    ggml_backend_tensor_set(b, columns.data(), 0, k * n * sizeof(float));
    CHECK_EQ(ggml_backend_graph_compute(cpu, graph), GGML_STATUS_SUCCESS);
    std::vector<float> found(n_rows * n);
    ggml_backend_tensor_get(c, found.data(), 0, found.size() * sizeof(float));
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    return found;
}

// Every number of columns gives each of them the values that it has alone: on x86 bit by bit, but for
// long rows of IQ4_NL, which alone are summed in another order.
void columns_alone_and_together(ggml_backend_t cpu, ggml_type type, int64_t k, int64_t n_rows) {
    constexpr int64_t  N = 12;
    std::vector<float> values(k * n_rows), columns(k * N);
    uint32_t           state = 1;
    const auto draw = [&state] { return (float) ((state = state * 1664525 + 1013904223) >> 8) / (1 << 24) - 0.4f; };
    for (float & value : values)  value = draw();
    for (float & value : columns) value = draw();
    std::vector<uint8_t> weights(ggml_row_size(type, k) * n_rows);
    ggml_quantize_chunk(type, values.data(), weights.data(), 0, n_rows, k, nullptr);

    const bool exact = strstr(llama_print_system_info(), "AVX2 = 1") && (type != GGML_TYPE_IQ4_NL || k == SHORT);
    std::vector<float> alone;
    for (int64_t j = 0; j < N; ++j) {
        const std::vector<float> column(columns.begin() + j * k, columns.begin() + (j + 1) * k);
        const auto found = product(cpu, weights, type, column, k, n_rows, 1);
        for (int64_t i = 0; i < n_rows; ++i) {
            double expected = 0; // what the weights were before: the quants' rounding is all that differs
            for (int64_t l = 0; l < k; ++l) {
                expected += (double) values[i * k + l] * column[l];
            }
            CHECK(std::fabs(found[i] - expected) < 0.05 * std::sqrt((double) k));
        }
        alone.insert(alone.end(), found.begin(), found.end());
    }
    for (int64_t n = 2; n <= N; ++n) {
        const auto together = product(cpu, weights, type, columns, k, n_rows, n);
        for (size_t i = 0; i < together.size(); ++i) {
            CHECK(exact ? together[i] == alone[i] : std::fabs(together[i] - alone[i]) < 1e-3f * std::sqrt((float) k));
        }
    }
}

} // namespace

int main(int argc, char ** argv) {
    const std::string tiny = model_path(argc, argv), source = argc > 3 ? argv[3] : "";
    CHECK(!source.empty());
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    printf("%s\n", llama_print_system_info());
    ggml_backend_t cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    for (const ggml_type type : {GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL}) {
        for (const int64_t k : {SHORT, LONG}) {
            for (const int64_t n_rows : {8, 11}) {
                columns_alone_and_together(cpu, type, k, n_rows);
            }
        }
    }
    for (const ggml_type type : {GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K}) {
        for (const int64_t k : {BLOCK, LONG}) {
            for (const int64_t n_rows : {8, 11}) {
                columns_alone_and_together(cpu, type, k, n_rows);
            }
        }
    }
    ggml_backend_free(cpu);
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
