// The largest candidates of a row, in the order in which llama.cpp's chain would have them.
//
// The chain finds them with std::partial_sort (k <= 128), or by 128 buckets over the logits from -10
// to 10, each bucket sorted, the last one partially. Where logits are equal, their order follows from
// what these algorithms do with the elements before and after: so the same algorithms are run here,
// on those elements only that can make a difference.
#include "sampling/fused.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

namespace plb {

namespace {

constexpr int32_t N_BUCKETS = 128;

bool larger(const candidate & a, const candidate & b) {
    return a.logit > b.logit;
}

int32_t bucket_of(float logit) {
    const float at = 6.4f * logit + 64.0f;
    return (int32_t) std::max(0.0f, std::min((float) (N_BUCKETS - 1), at));
}

// A logit that nothing of this bucket, or of a higher one, is below.
float floor_of(int32_t bucket) {
    return bucket <= 0 ? -INFINITY : (float) (bucket - 64) / 6.4f - 1e-4f;
}

int32_t lowest_bit(uint64_t bits) {
    return __builtin_ctzll(bits);
}

// One step of std::partial_sort: a candidate above the smallest of the k so far takes its place in
// the heap. Which of the equal ones end where depends on how the library does it.
void take_in(candidate * heap, int32_t k, candidate taken) {
#if defined(_LIBCPP_VERSION)
    // from the top down, as far as it has to
    int32_t hole = 0;
    for (int32_t child = 1; child < k; child = 2 * hole + 1) {
        child += child + 1 < k && larger(heap[child], heap[child + 1]);
        if (larger(heap[child], taken)) {
            break;
        }
        heap[hole] = heap[child];
        hole = child;
    }
    heap[hole] = taken;
#else
    // the hole at the top goes all the way down, the new one up from there: std::pop_heap
    heap[k] = taken;
    std::pop_heap(heap, heap + k + 1, larger);
#endif
}

} // namespace

// The candidates x >= low for which keep(x) holds, in index order: how many, -1 if over limit.
template <typename Keep>
int32_t fused_row::gather(candidate * out, float low, int32_t limit, Keep keep) const {
    int32_t n = 0;
    for (int32_t b = 0; b < row_.n_blocks; ++b) {
        if (!(m_->block_max[b] >= low)) {
            continue;
        }
        const float * x = row_.block(b);
        for (uint64_t bits = at_least(x, low); bits != 0; bits &= bits - 1) {
            const int32_t i = lowest_bit(bits);
            const int32_t id = b * BLOCK + i;
            if (id < row_.n && keep(x[i])) {
                if (n == limit) {
                    return -1;
                }
                out[n++] = {x[i], id};
            }
        }
    }
    return n;
}

// To the list: the finite x >= low.
int32_t fused_row::gather_above(float low, int32_t limit) const {
    return gather(m_->list.get(), low, limit, [](float x) { return x > -INFINITY; });
}

// A bound that the maxima of at least k blocks reach, and not of many more; -inf if there are fewer.
float fused_row::top_block(int32_t k) {
    constexpr int32_t SAMPLE = 512;
    const float * top = m_->block_max.data();
    float * some = m_->grid.data();
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

// Sorts the list, which is in index order: by logit, then by id. True if none of the first k is
// equal to another one.
bool fused_row::sort_list(int32_t n, int32_t k) {
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
    bool distinct = true;
    for (int32_t i = 1; i < n && i <= k; ++i) {
        distinct = distinct && from[i].logit != from[i - 1].logit;
    }
    return distinct;
}

// The first k, in the order of the chain's bucket sort.
int32_t fused_row::order_top(int32_t k) {
    const float bound = top_block(k);
    if (bound > -INFINITY) {
        const int32_t n = gather_above(bound, 8 * k);
        if (n >= k && sort_list(n, k)) {
            return k;
        }
    }
    return order_by_buckets(k); // the order of equal ones is the chain's business
}

// std::partial_sort of all candidates for the first k: those that are not above the smallest of the
// k so far change nothing, and whole blocks are not.
int32_t fused_row::order_by_heap(int32_t k) {
    candidate * heap = m_->list.get();
    for (int32_t i = 0; i < k; ++i) {
        heap[i] = {row_.block(i / BLOCK)[i % BLOCK], i};
    }
    std::make_heap(heap, heap + k, larger);
    const float * top = m_->block_max.data();
    for (int32_t b = k / BLOCK; b < row_.n_blocks; ++b) {
        if (!(top[b] > heap[0].logit)) {
            continue;
        }
        const float * x = row_.block(b);
        uint64_t bits = at_least(x, heap[0].logit);
        if (b == k / BLOCK) {
            bits &= ~0ull << (k % BLOCK);
        }
        for (; bits != 0; bits &= bits - 1) {
            const int32_t i = lowest_bit(bits);
            if (x[i] > heap[0].logit) {
                take_in(heap, k, {x[i], b * BLOCK + i});
            }
        }
    }
    std::sort_heap(heap, heap + k, larger);
    return k;
}

// The same for one bucket of the row.
void fused_row::heap_of_bucket(candidate * heap, int32_t bucket, int32_t k) const {
    const float low = floor_of(bucket);
    const float * top = m_->block_max.data();
    int32_t n = 0;
    for (int32_t b = 0; b < row_.n_blocks; ++b) {
        if (n == k ? !(top[b] > heap[0].logit) : !(top[b] >= low)) {
            continue;
        }
        const float * x = row_.block(b);
        uint64_t bits = at_least(x, n == k ? heap[0].logit : low);
        for (; bits != 0; bits &= bits - 1) {
            const int32_t i = lowest_bit(bits);
            const int32_t id = b * BLOCK + i;
            if (id >= row_.n || bucket_of(x[i]) != bucket) {
                continue;
            }
            if (n < k) {
                heap[n++] = {x[i], id};
                if (n == k) {
                    std::make_heap(heap, heap + k, larger);
                }
            } else if (x[i] > heap[0].logit) {
                take_in(heap, k, {x[i], id});
            }
        }
    }
    std::sort_heap(heap, heap + n, larger);
}

// The chain's bucket sort for the first k. The list then holds them.
int32_t fused_row::order_by_buckets(int32_t k) {
    const float bound = top_block(k);
    const int32_t last = bound == -INFINITY ? -1 : bucket_of(bound); // what is below is not wanted
    candidate * found = m_->list.get();
    const int32_t n = gather(found, floor_of(last + 1), row_.n,
                             [=](float x) { return bucket_of(x) > last; });
    int32_t count[N_BUCKETS] = {};
    for (int32_t i = 0; i < n; ++i) {
        ++count[bucket_of(found[i].logit)];
    }
    int32_t bucket = N_BUCKETS, reached = 0; // the last one that is needed, complete or in part
    while (reached < k && bucket > last + 1) {
        reached += count[--bucket];
    }
    candidate * out = m_->other.get();
    int32_t start[N_BUCKETS];
    for (int32_t b = N_BUCKETS - 1, at = 0; b >= bucket; --b) {
        start[b] = at;
        at += count[b];
    }
    for (int32_t i = 0; i < n; ++i) {
        const int32_t b = bucket_of(found[i].logit);
        if (b >= bucket) {
            out[start[b]++] = found[i];
        }
    }
    int32_t done = 0;
    for (int32_t b = N_BUCKETS - 1; b >= bucket; --b) {
        candidate * first = out + done;
        if (b == bucket && reached >= k) {
            std::partial_sort(first, out + k, first + count[b], larger);
        } else {
            std::sort(first, first + count[b], larger);
        }
        done += count[b];
    }
    if (reached < k) {
        heap_of_bucket(out + reached, last, k - reached);
    }
    m_->list.swap(m_->other);
    return k;
}

// The chain's sort of everything, down to `low` at least: how many the list then holds, at most
// BUCKETED, or -1. If the last bucket takes it beyond that, equal logits go by id.
int32_t fused_row::order_all(float low) {
    const int32_t last = bucket_of(low);
    candidate * found = m_->list.get();
    int32_t n = gather(found, floor_of(last), BUCKETED, [=](float x) { return bucket_of(x) >= last; });
    if (n < 0) {
        n = gather_above(low, LIST);
        if (n > 0) {
            sort_list(n, 0);
        }
        return n;
    }
    int32_t count[N_BUCKETS] = {}, start[N_BUCKETS];
    for (int32_t i = 0; i < n; ++i) {
        ++count[bucket_of(found[i].logit)];
    }
    for (int32_t b = N_BUCKETS - 1, at = 0; b >= 0; --b) {
        start[b] = at;
        at += count[b];
    }
    candidate * out = m_->other.get();
    for (int32_t i = 0; i < n; ++i) {
        out[start[bucket_of(found[i].logit)]++] = found[i];
    }
    for (int32_t b = N_BUCKETS - 1, at = 0; b >= last; --b) {
        candidate * end = out + at + count[b];
        if (at + count[b] == row_.n && at < row_.n) {
            std::partial_sort(out + at, end, end, larger); // the row's last bucket
        } else {
            std::sort(out + at, end, larger);
        }
        at += count[b];
    }
    m_->list.swap(m_->other);
    return n;
}

} // namespace plb
