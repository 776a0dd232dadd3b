// Device sampling: the device keeps the largest logits of every row, and only they travel. It is a
// backend sampler of ours (llama_set_sampler) in every sequence's place: one top-k over all rows of
// a graph, however many sequences there are, where libllama's own chain makes the whole chain of
// operations for each of them. What is left to do (top-p, min-p, temperature, the seeded draw) is
// the fused sampler's, on SHORTLIST candidates instead of a vocabulary.
#pragma once

#include "plb.h"

#include <cstdint>
#include <unordered_map>
#include <vector>

struct ggml_tensor;

namespace plb {

constexpr int32_t SHORTLIST = 128; // candidates of a row that travel

// Rows of so many graphs are known; then libllama is made to drop all its graphs. Which of them it
// may use again, it does not say.
constexpr size_t MOST_GRAPHS = 1 << 13;

// One row's SHORTLIST candidates, in no order.
struct short_row {
    const float *       logit = nullptr;
    const llama_token * id    = nullptr;
};

class shortlist {
public:
    // on_cpu: also for a model whose output is computed there
    shortlist(llama_context * ctx, bool on_cpu);
    shortlist(llama_context * ctx, const shortlist & before) // of another context
        : shortlist(ctx, before.shared_.on_cpu) {}
    ~shortlist(); // does not touch the context
    shortlist(const shortlist &) = delete;
    shortlist & operator=(const shortlist &) = delete;

    // Whether rows of this vocabulary have a place for the candidates of n_outputs rows.
    static bool fits(int32_t n_vocab, int32_t n_outputs);

    // From the next decode on. False, and nothing has changed: the device can't. Before each one.
    bool attach();
    void detach();
    bool attached() const { return !chains_.empty(); }
    // After a decode: the candidates of each of the batch's rows that is an output. Where a sequence has
    // several, all of the batch's rows are. False if they can't be told.
    bool read(const llama_batch & batch, std::vector<short_row> & rows);

    // What the samplers of one context share: they are asked one by one for the same graph.
    struct shared {
        void * graph_context = nullptr; // of the graph that is being built
        ggml_tensor * logits = nullptr; // SHORTLIST of each row, then the graph's serial number
        ggml_tensor * ids    = nullptr;
        int32_t serial  = 0;
        bool    on_cpu  = false;
        bool    refused = false;        // by the device
        std::vector<llama_seq_id> * seq_of = nullptr; // of that graph
        // By serial number, since it was attached: the sequence of each output, of the first one -1.
        std::unordered_map<int32_t, std::vector<llama_seq_id>> graphs;
        int32_t n_seq_max = 0;
        int32_t n_vocab   = 0;
    };

private:
    void free_chains();

    llama_context * ctx_;
    shared          shared_;
    std::vector<llama_sampler *> chains_; // [n_seq_max]
    struct own_row { // of a graph, not its first one
        short_row row;
        int32_t   next; // of the same sequence; -1: none
    };
    std::vector<own_row> own_rows_;
    std::vector<int32_t> next_of_, last_of_; // [n_seq_max], in own_rows_
};

} // namespace plb
