// The vectorised passes over a row of logits, one set per instruction set, chosen once at run time.
#pragma once

#include <cfloat>
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

// A weight is exp(x / temp - largest / temp) of the logits x >= low, which is finite, 0 of the others.
struct weighing {
    float temp;
    float largest;
    float top; // largest / temp
    float low; // not below largest - 87 * temp: smaller weights are taken for 0
    float scale; // log2(e) / temp

    weighing(float temp, float largest, float least)
        : temp(temp), largest(largest), top(largest / temp),
          low(std::fmax(std::fmax(least, largest - 87 * temp), -FLT_MAX)), scale((float) (1.4426950408889634 / temp)) {}
};

struct kernels {
    const char * name;
    // The largest of n values: the yardstick of the benches. n is a multiple of BLOCK.
    float (*maximum)(const float * x, int32_t n);
    // Maxima of blocks first..last-1 (NaN left out of account); true if one holds a NaN.
    bool (*scan)(const row_view & row, int32_t first, int32_t last, float * block_max);
    // Sums of weights of blocks first..last-1.
    void (*weigh)(const row_view & row, int32_t first, int32_t last, const float * block_max,
                  const weighing & how, double * block_sum);
    // The same, and in upper_sum the part of it that has x >= upper.
    void (*weigh_both)(const row_view & row, int32_t first, int32_t last, const float * block_max,
                       const weighing & how, float upper, double * block_sum, double * upper_sum);
    // Bit i is set where low <= x[i] < upper, for one block.
    uint64_t (*between)(const float * x, float low, float upper);
    // BLOCK weights.
    void (*weights)(const float * x, const weighing & how, float * out);
};

// The best set for this machine. PLB_SIMD=base|avx2|avx512 in the environment asks for less.
const kernels & best_kernels();
// A set by name, nullptr when it was not compiled in or this machine can't run it.
const kernels * kernels_named(const char * name);

} // namespace plb
