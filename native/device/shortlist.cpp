// The graph of the shortlist, and finding its rows in what libllama copied.
#include "device/shortlist.hpp"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>

namespace plb {

namespace {

struct member {
    shortlist::shared * shared;
    llama_seq_id        seq;
};

member & self(llama_sampler * sampler) {
    return *static_cast<member *>(sampler->ctx);
}

struct tensors {
    ggml_tensor * logits;
    ggml_tensor * ids;
};

// rows: float32 [n_vocab, n], the last one libllama's padding. The logits of all rows' candidates
// and behind them the serial number, in one piece: one copy to the host, not one for every row.
tensors make_graph(ggml_context * ctx, ggml_tensor * rows, int32_t serial) {
    const int64_t n_vocab = rows->ne[0];
    const int64_t n       = ggml_nrows(rows);
    ggml_tensor * ids    = ggml_top_k(ctx, rows, SHORTLIST);
    ggml_tensor * single = ggml_reshape_3d(ctx, rows, 1, n_vocab, n);
    ggml_tensor * logits = ggml_get_rows(ctx, single, ids);
    logits = ggml_reshape_1d(ctx, logits, n * SHORTLIST);
    ggml_tensor * number = ggml_fill(ctx, ggml_view_1d(ctx, logits, 1, 0), (float) serial);
    return {ggml_concat(ctx, logits, number, 0), ggml_reshape_1d(ctx, ids, n * SHORTLIST)};
}

bool supported(ggml_backend_dev_t device, int32_t n_vocab) {
    if (device == nullptr) {
        return true; // the CPU's
    }
    ggml_init_params params = {64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true};
    ggml_context * ctx = ggml_init(params);
    if (ctx == nullptr) {
        return false;
    }
    ggml_cgraph * graph = ggml_new_graph(ctx);
    const tensors made = make_graph(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_vocab, 2), 1);
    ggml_build_forward_expand(graph, made.logits);
    ggml_build_forward_expand(graph, made.ids);
    bool all = true;
    for (int32_t i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        all = all && ggml_backend_dev_supports_op(device, ggml_graph_node(graph, i));
    }
    ggml_free(ctx);
    return all;
}

// -- llama_sampler_i ------------------------------------------------------------------------------
const char * get_name(const llama_sampler *) {
    return "pyllamabatch-shortlist";
}

void apply_on_host(llama_sampler *, llama_token_data_array *) {} // never asked to

void free_member(llama_sampler * sampler) {
    delete static_cast<member *>(sampler->ctx);
}

bool backend_init(llama_sampler * sampler, ggml_backend_buffer_type_t type, uint32_t) {
    shortlist::shared & shared = *self(sampler).shared;
    ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
    const bool cpu = device == nullptr || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
    shared.refused =
        shared.refused || (cpu && !shared.on_cpu) || !supported(device, shared.n_vocab);
    return !shared.refused;
}

void backend_reset(llama_sampler * sampler) {
    self(sampler).shared->graph_context = nullptr;
}

// Asked for every output of every sequence of the context; those without a row in this graph are given
// row 0.
void backend_apply(llama_sampler * sampler, ggml_context * ctx, ggml_cgraph * graph,
                   llama_sampler_data * data) {
    const auto & [shared_ptr, seq] = self(sampler);
    shortlist::shared & shared = *shared_ptr;
    ggml_tensor * rows = data->logits->view_src != nullptr ? data->logits->view_src : data->logits;
    const int32_t n_rows = (int32_t) ggml_nrows(rows) - 1;
    const int32_t row = data->logits == rows ? 0 : (int32_t) (data->logits->view_offs / rows->nb[1]);
    *data = {};
    if (!shortlist::fits((int32_t) rows->ne[0], n_rows)) {
        return; // a graph that is only measured
    }
    if (shared.graph_context != ctx) {
        shared.graph_context = ctx;
        shared.serial = shared.serial % (1 << 20) + 1; // exact as a float
        const tensors made = make_graph(ctx, rows, shared.serial);
        ggml_build_forward_expand(graph, made.logits);
        shared.logits = made.logits;
        shared.ids    = made.ids;
        if (n_rows > 0) {
            shared.seq_of = &shared.graphs[shared.serial];
            shared.seq_of->assign((size_t) n_rows, -1);
        }
    }
    if (row > 0) {
        (*shared.seq_of)[(size_t) row] = seq;
    } else { // the first row carries what belongs to all
        data->logits     = shared.logits;
        data->candidates = shared.ids;
    }
}

llama_sampler_i interface_of_members() {
    llama_sampler_i functions = {};
    functions.name          = get_name;
    functions.apply         = apply_on_host;
    functions.free          = free_member;
    functions.backend_init  = backend_init;
    functions.backend_apply = backend_apply;
    functions.backend_reset = backend_reset;
    return functions;
}

} // namespace

bool shortlist::fits(int32_t n_vocab, int32_t n_outputs) {
    return (int64_t) SHORTLIST * (n_outputs + 1) + 1 <= n_vocab;
}

shortlist::shortlist(llama_context * ctx, bool on_cpu) : ctx_(ctx) {
    shared_.on_cpu    = on_cpu;
    shared_.n_seq_max = (int32_t) llama_n_seq_max(ctx);
    shared_.n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    own_rows_.reserve(llama_n_batch(ctx));
    next_of_.resize((size_t) shared_.n_seq_max);
    last_of_.resize((size_t) shared_.n_seq_max);
}

shortlist::~shortlist() {
    free_chains(); // the context may be gone
}

void shortlist::free_chains() {
    for (llama_sampler * chain : chains_) {
        llama_sampler_free(chain);
    }
    chains_.clear();
}

bool shortlist::attach() {
    static llama_sampler_i functions = interface_of_members();
    if (shared_.graphs.size() >= MOST_GRAPHS) {
        detach();
    }
    if (attached()) {
        return true;
    }
    if (shared_.refused) {
        return false;
    }
    try {
        for (llama_seq_id seq = 0; seq < shared_.n_seq_max; ++seq) {
            llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
            chains_.push_back(chain);
            llama_sampler_chain_add(chain, llama_sampler_init(&functions, new member{&shared_, seq}));
            if (!llama_set_sampler(ctx_, seq, chain) || shared_.refused) {
                shared_.refused = true;
                detach();
                return false;
            }
        }
    } catch (...) {
        detach(); // all or none
        throw;
    }
    return true;
}

void shortlist::detach() {
    for (size_t seq = 0; seq < chains_.size(); ++seq) {
        llama_set_sampler(ctx_, (llama_seq_id) seq, nullptr);
    }
    free_chains();
    shared_.graphs.clear();
    shared_.graph_context = nullptr;
    shared_.seq_of = nullptr;
}

bool shortlist::read(const llama_batch & batch, std::vector<short_row> & rows) {
    own_rows_.clear();
    std::fill(next_of_.begin(), next_of_.end(), -1);
    std::fill(last_of_.begin(), last_of_.end(), -1);
    rows.assign((size_t) batch.n_tokens, {});
    const auto is_output = [](int8_t output) { return output != 0; };
    auto n_left = std::count_if(batch.logits, batch.logits + batch.n_tokens, is_output);
    for (int32_t i = 0; n_left > 0 && i < batch.n_tokens; ++i) { // libllama waits for the device at each look
        const uint32_t n = batch.logits[i] ? llama_get_sampled_logits_count_ith(ctx_, i) : 0;
        if (n == 0) {
            continue;
        }
        const float * logits = llama_get_sampled_logits_ith(ctx_, i);
        const llama_token * ids = llama_get_sampled_candidates_ith(ctx_, i);
        const auto graph = shared_.graphs.find((int32_t) logits[n - 1]);
        if (graph == shared_.graphs.end() || n != SHORTLIST * (graph->second.size() + 1) + 1) {
            return false;
        }
        rows[(size_t) i] = {logits, ids};
        n_left -= (ptrdiff_t) graph->second.size();
        for (size_t row = 1; row < graph->second.size(); ++row) {
            const llama_seq_id of = graph->second[row];
            if (of < 0 || of >= shared_.n_seq_max) {
                return false;
            }
            const auto seq = (size_t) of;
            int32_t & before = last_of_[seq] < 0 ? next_of_[seq] : own_rows_[(size_t) last_of_[seq]].next;
            before = last_of_[seq] = (int32_t) own_rows_.size();
            own_rows_.push_back({{logits + row * SHORTLIST, ids + row * SHORTLIST}, -1});
        }
    }
    // The rows of a sequence come in the batch's order.
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        if (!batch.logits[i] || rows[(size_t) i].logit != nullptr) {
            continue;
        }
        int32_t & next = next_of_[(size_t) batch.seq_id[i][0]];
        if (next < 0) {
            return false;
        }
        rows[(size_t) i] = own_rows_[(size_t) next].row;
        next = own_rows_[(size_t) next].next;
    }
    return true;
}

} // namespace plb
