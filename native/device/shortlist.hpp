// Device sampling: the device keeps the largest logits of every row, and only they travel. It is a
// backend sampler of ours (llama_set_sampler) in every sequence's place: one top-k over all rows of
// a graph, however many sequences there are, where libllama's own chain makes the whole chain of
// operations for each of them. What is left to do (top-p, min-p, temperature, the seeded draw) is
// the fused sampler's, on SHORTLIST candidates instead of a vocabulary.
#pragma once

#include "plb.h"

#include <cstdint>
#include <vector>

struct ggml_tensor;

namespace plb {

constexpr int32_t SHORTLIST = 128; // candidates of a row that travel

// Rows of so many graphs are known; then libllama is made to drop all its graphs. Which of them it
// may use again, it does not say.
constexpr size_t MOST_GRAPHS = 1024;

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
    // After a decode: the candidates of each of the batch's rows that is an output. False if they
    // can't be told (not one output per sequence).
    bool read(const llama_batch & batch, std::vector<short_row> & rows);

    // What the samplers of one context share: they are asked one by one for the same graph.
    struct shared {
        void * graph_context = nullptr; // of the graph that is being built
        ggml_tensor * logits = nullptr; // SHORTLIST of each row, then the graph's serial number
        ggml_tensor * ids    = nullptr;
        int32_t serial  = 0;
        bool    on_cpu  = false;
        bool    refused = false;        // by the device
        struct graph {
            int32_t serial;
            int32_t n_rows;                // outputs
            std::vector<int32_t> row_of;   // [n_seq_max]: each sequence's; 0 also if it has none
        };
        std::vector<graph> graphs; // since it was attached
        int32_t n_seq_max = 0;
        int32_t n_vocab   = 0;
    };

private:
    void free_chains();

    llama_context * ctx_;
    shared          shared_;
    std::vector<llama_sampler *> chains_; // [n_seq_max]
    struct head {
        const float *        logits;
        const llama_token *  ids;
        const shared::graph * graph;
    };
    std::vector<head> heads_; // one of each graph of the batch
};

} // namespace plb
