// Rows of logits of several shapes, and one through one set of kernels.
#pragma once

#include "step/engine.hpp"

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

using plb::fused_row;

#ifdef __SANITIZE_ADDRESS__ // built without optimisation, too
constexpr int32_t SHARE = 10; // a tenth of the random rows
#else
constexpr int32_t SHARE = 1;
#endif

const char * const SHAPES[] = {"narrow", "normal", "wide", "peaked", "ties", "half", "flat", "equal",
                               "excluded", "high"};
constexpr int32_t N_SHAPES = 10;

inline void fill(std::vector<float> & x, int32_t shape, std::mt19937 & random) {
    const float width[] = {1, 3, 6, 3, 3, 3, 1e-3f, 0, 3, 9};
    std::normal_distribution<float> draw(0, 1);
    for (float & v : x) {
        v = width[shape] * draw(random);
    }
    std::uniform_int_distribution<size_t> index(0, x.size() - 1);
    const std::string name = SHAPES[shape];
    if (name == "peaked") {
        for (int i = 0; i < 20; ++i) {
            x[index(random)] = 12 + 3 * draw(random);
        }
    } else if (name == "ties") {
        for (float & v : x) {
            v = std::round(v * 8) / 8;
        }
    } else if (name == "half") { // the ties of logits with 11 significant bits
        for (float & v : x) {
            uint32_t bits;
            memcpy(&bits, &v, sizeof(bits));
            bits = (bits + 0x1000) & ~0x1fffu;
            memcpy(&v, &bits, sizeof(bits));
        }
    } else if (name == "equal") {
        std::fill(x.begin(), x.end(), 1.0f);
    } else if (name == "excluded") {
        for (float & v : x) {
            v = index(random) % 10 ? -INFINITY : v;
        }
        x[index(random)] = 1;
    } else if (name == "high") {
        for (float & v : x) {
            v += 14;
        }
    }
}

inline plb_sampling sampling(float temperature, int32_t top_k, float top_p, float min_p) {
    plb_sampling p = plb_sampling_default();
    p.max_tokens  = INT32_MAX;
    p.temperature = temperature;
    p.top_k       = top_k;
    p.top_p       = top_p;
    p.min_p       = min_p;
    return p;
}

// One row through one set of kernels, in one piece or in parts.
struct one_row {
    plb::fused_memory memory;
    fused_row         row;
    plb::fused_request request;

    explicit one_row(int32_t n_vocab) : memory(n_vocab) {}

    llama_token sample(const plb::kernels & set, std::vector<float> & x, const plb_sampling & p,
                       plb::fused_state & state, int32_t n_parts = 1) {
        request.logits = x.data();
        request.params = &p;
        request.state  = &state;
        row.bind(set, memory);
        for (auto pass = row.begin(request); pass != fused_row::NONE; pass = row.next()) {
            for (int32_t i = 0; i < n_parts; ++i) {
                row.run(pass, (int32_t) ((int64_t) row.n_blocks() * i / n_parts),
                        (int32_t) ((int64_t) row.n_blocks() * (i + 1) / n_parts));
            }
        }
        return request.token;
    }
};
