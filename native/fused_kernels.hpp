// The vectorised passes over a row of logits, one set per instruction set, chosen once at run time.
#pragma once

#include <cmath>
#include <cstdint>

namespace plb {

constexpr int32_t BLOCK = 64; // logits per block: passes report per block, later ones skip blocks

// A row of n logits as blocks; the last one, when it is not full, is a copy padded with -inf.
struct row_view {
    const float * x    = nullptr;
    const float * tail = nullptr;
    int32_t n        = 0;
    int32_t n_full   = 0;
    int32_t n_blocks = 0;

    const float * block(int32_t b) const { return b < n_full ? x + (int64_t) b * BLOCK : tail; }
};

// A weight is exp(x / temp - top) of the logits x >= low, 0 of the others.
struct weighing {
    float temp;
    float top; // largest x / temp
    float low; // not below temp * (top - 87): smaller weights are taken for 0

    weighing(float temp, float largest, float least)
        : temp(temp), top(largest / temp), low(std::fmax(least, largest - 87 * temp)) {}
};

struct kernels {
    const char * name;
    // The largest of n values: the yardstick of the benches. n is a multiple of BLOCK.
    float (*maximum)(const float * x, int32_t n);
    // Maxima of blocks first..last-1 (NaN left out of account); true if one holds a NaN.
    bool (*scan)(const row_view & row, int32_t first, int32_t last, float * block_max);
    // Sums of weights of blocks first..last-1; relative error of each below WEIGH_ERROR.
    void (*weigh)(const row_view & row, int32_t first, int32_t last, const float * block_max,
                  const weighing & how, double * block_sum);
    // The same at temperature 1, and in upper_sum the part of it that has x >= upper.
    void (*weigh_both)(const row_view & row, int32_t first, int32_t last, const float * block_max,
                       const weighing & how, float upper, double * block_sum, double * upper_sum);
    // As weigh, with each weight rounded to the nearest float, as expf gives it.
    void (*weigh_exactly)(const row_view & row, int32_t first, int32_t last,
                          const float * block_max, const weighing & how, double * block_sum);
    // What the weights of a block add to a running float sum that is in [base[b], 2 base[b]):
    // grid[b]; NaN when that depends on the sum's last bit.
    void (*round)(const row_view & row, int32_t first, int32_t last, const weighing & how,
                  const float * base, float * grid);
    // Bit i is set where x[i] >= low, for one block.
    uint64_t (*at_least)(const float * x, float low);
    // BLOCK weights, each rounded to the nearest float.
    void (*weights)(const float * x, const weighing & how, float * out);
};

constexpr double WEIGH_ERROR = 5e-7;

// The best set for this machine. PLB_SIMD=base|avx2|avx512 in the environment asks for less.
const kernels & best_kernels();
// A set by name, nullptr when it was not compiled in or this machine can't run it.
const kernels * kernels_named(const char * name);

} // namespace plb
