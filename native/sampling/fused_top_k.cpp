// The largest candidates of a row: by logit, equal ones by id.
#include "sampling/fused.hpp"

#include <algorithm>
#include <cstring>
#include <functional>

namespace plb {

// To the list, in index order: the finite x >= low. How many, -1 if over limit.
int32_t fused_row::gather_above(float low, int32_t limit) const {
    candidate * out = m_->list.get();
    int32_t n = 0;
    for (int32_t b = 0; b < row_.n_blocks; ++b) {
        if (!(m_->block_max[b] >= low)) {
            continue;
        }
        const float * x = row_.block(b);
        for (uint64_t bits = at_least(x, low); bits != 0; bits &= bits - 1) {
            const int32_t i = __builtin_ctzll(bits);
            if (x[i] > -INFINITY) {
                if (n == limit) {
                    return -1;
                }
                out[n++] = {x[i], b * BLOCK + i};
            }
        }
    }
    return n;
}

// A bound that the maxima of at least k blocks reach, and not of many more; -inf if there are fewer.
float fused_row::top_block(int32_t k) {
    constexpr int32_t SAMPLE = 512;
    const float * top = m_->block_max.data();
    float * some = m_->scratch.data();
    const int32_t n = row_.n_blocks;
    if (k > n) {
        return -INFINITY;
    }
    const int32_t stride = n / SAMPLE;
    for (int32_t more = 2; stride > 1 && more <= 4; ++more) {
        int32_t n_some = 0;
        for (int32_t b = 0; b < n; b += stride) {
            some[n_some++] = top[b];
        }
        const int32_t rank = (int32_t) ((int64_t) k * more / (2 * stride)) + 4 * more;
        if (rank > n_some) {
            break;
        }
        std::nth_element(some, some + rank - 1, some + n_some, std::greater<float>());
        const float bound = some[rank - 1];
        int32_t reached = 0, b = 0;
        for (; b + BLOCK <= n; b += BLOCK) {
            reached += __builtin_popcountll(at_least(top + b, bound));
        }
        for (; b < n; ++b) {
            reached += top[b] >= bound;
        }
        if (reached >= k && reached <= 3 * k + 64) {
            return bound;
        }
    }
    std::copy(top, top + n, some);
    std::nth_element(some, some + k - 1, some + n, std::greater<float>());
    return some[k - 1];
}

// Sorts the list, which is in index order: a radix sort, which keeps that order among equal logits.
void fused_row::sort_list(int32_t n) {
    candidate * from = m_->list.get();
    candidate * to   = m_->other.get();
    const auto key = [](float logit) { // ascending where logits descend
        uint32_t bits;
        memcpy(&bits, &logit, sizeof(bits));
        return bits >> 31 ? bits : ~bits & 0x7fffffffu;
    };
    int32_t count[4][256] = {};
    for (int32_t i = 0; i < n; ++i) {
        from[i].logit += 0.0f; // -0 is 0
        const uint32_t bits = key(from[i].logit);
        for (int32_t digit = 0; digit < 4; ++digit) {
            ++count[digit][bits >> 8 * digit & 255];
        }
    }
    for (int32_t digit = 0; digit < 4; ++digit) {
        if (count[digit][key(from[0].logit) >> 8 * digit & 255] == n) {
            continue; // the same in all of them
        }
        for (int32_t value = 0, at = 0; value < 256; ++value) {
            const int32_t here = count[digit][value];
            count[digit][value] = at;
            at += here;
        }
        for (int32_t i = 0; i < n; ++i) {
            to[count[digit][key(from[i].logit) >> 8 * digit & 255]++] = from[i];
        }
        m_->list.swap(m_->other);
        std::swap(from, to);
    }
}

// The list then holds the k largest, or all finite ones where there are fewer: how many.
int32_t fused_row::take_top(int32_t k) {
    const int32_t n = gather_above(top_block(k), row_.n);
    if (n <= RADIX_MIN) {
        candidate * list = m_->list.get();
        std::partial_sort(list, list + std::min(k, n), list + n, by_logit_and_id);
    } else {
        sort_list(n);
    }
    return std::min(k, n);
}

} // namespace plb
