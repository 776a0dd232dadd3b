// Top-p over the whole vocabulary.
//
// Where the nucleus is small, its candidates become a list in the chain's order, and the chain's own
// float arithmetic decides where it ends: that needs its running float sum over all the weights, with
// the rounding of each of its additions (running_sum). Where it is large, the end is found between two
// bounds that a sample of the row suggests and one pass over all weights confirms.
#include "fused.hpp"

#include <algorithm>
#include <cmath>

namespace plb {

namespace {

constexpr int32_t FIRST_TRY   = 256;  // the chain's first sort is for as many
constexpr int32_t SMALL       = 1024; // a nucleus up to here is certainly made a list
constexpr int32_t N_BINS      = 1024;
constexpr int32_t SAMPLED     = 128;  // blocks
constexpr double  SUM_ERROR   = 0.03; // a float sum's, of up to 2^19 terms

bool by_logit_and_id(const candidate & a, const candidate & b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// Equal steps of the logit over (low, high).
struct bins {
    float low, scale;

    bins(float low, float high, int32_t n) : low(low), scale((float) n / (high - low)) {
        scale = std::isfinite(scale) ? scale : 0;
    }
    int32_t of(float x, int32_t n) const {
        const float at = (x - low) * scale;
        return (int32_t) std::max(0.0f, std::min((float) (n - 1), at));
    }
    float edge(int32_t bin) const { return scale > 0 ? low + (float) bin / scale : low; }
};

} // namespace

// The chain sorts such a vocabulary as it is.
fused_row::pass fused_row::small_vocabulary() {
    const int32_t n = row_.n;
    candidate * list = m_->list.get();
    float sum = 0;
    for (int32_t i = 0; i < n; ++i) {
        list[i] = {row_.x[i], i};
        sum += expf(list[i].logit - largest_);
    }
    if (n <= 128) {
        std::partial_sort(list, list + n, list + n, [](const candidate & a, const candidate & b) {
            return a.logit > b.logit;
        });
    } else {
        order_by_buckets(n);
    }
    return draw_from_list(nucleus(n, sum), true);
}

fused_row::pass fused_row::by_top_p() {
    const double p = r_->params->top_p;
    start_ = top_block(FIRST_TRY);
    slack_ = 0.12;
    how_   = weighing(1, largest_, -INFINITY);
    n_above_start_ = start_ > -INFINITY ? gather_above(start_, LIST) : 0;
    above_start_ = 0;
    for (int32_t i = 0; i < n_above_start_; ++i) {
        above_start_ += weight(m_->list[i].logit);
    }
    if (start_ == -INFINITY) {
        return then(WEIGH, &fused_row::after_list_weighing); // a vocabulary of few blocks
    }
    // a guess at the sum: what is above start_, and a sample of what is below
    const int32_t stride = std::max(1, row_.n_full / SAMPLED);
    double below = 0;
    for (int32_t b = 0; b < row_.n_full; b += stride) {
        k_->weigh_both(row_, b, b + 1, m_->block_max.data(), how_, start_, m_->block_sum.data(),
                       m_->upper_sum.data());
        below += m_->block_sum[b] - m_->upper_sum[b];
    }
    const double guess = above_start_ + below * stride;
    const double most = above_start_ + SMALL * (double) weight(start_);
    if (n_above_start_ > 0 && most > 0.9 * p * guess) {
        return then(WEIGH, &fused_row::after_list_weighing);
    }
    return bracket((1 - p) * guess);
}

// -- a small nucleus ------------------------------------------------------------------------------
fused_row::pass fused_row::after_list_weighing() {
    total_ = total(m_->block_sum);
    const double p = r_->params->top_p;
    const double most = above_start_ + SMALL * (double) weight(start_);
    if (start_ > -INFINITY && most < (1 - SUM_ERROR) * p * total_) {
        return bracket((1 - p) * total_);
    }
    double before = 0;
    for (int32_t b = 0; b < row_.n_blocks; ++b) {
        int exponent;
        std::frexp(before, &exponent);
        m_->base[b] = before > 1e-30 ? std::ldexp(1.0f, exponent - 1) : 0;
        before += m_->block_sum[b];
    }
    return then(ROUND, &fused_row::after_rounding);
}

// The float sum of all weights, added up one after the other as the chain does it. While the sum
// stays in [base, 2 base), each addition moves it along one grid, by the weight rounded to that grid:
// the kernel has added these up. Where that may not hold, the block is added up here.
float fused_row::running_sum() {
    float sum = 0;
    for (int32_t b = 0; b < row_.n_blocks; ++b) {
        const float base = m_->base[b], after = sum + m_->grid[b];
        if (base > 0 && sum >= base && after < 2 * base) { // false for a NaN
            sum = after;
            continue;
        }
        float e[BLOCK];
        k_->weights(row_.block(b), how_, e);
        for (const float w : e) {
            sum += w;
        }
    }
    return sum;
}

fused_row::pass fused_row::after_rounding() {
    return list_nucleus(running_sum());
}

fused_row::pass fused_row::list_nucleus(float sum) {
    const int32_t first = std::min(FIRST_TRY, row_.n);
    const float p = r_->params->top_p;
    order_by_buckets(first);
    // nucleus() gives all there are when the list ends before it reaches p
    int32_t kept = nucleus(first, sum);
    if (kept < first) {
        // a top-k of everything has sorted it all before
        const bool whole = r_->params->top_k > 0;
        if (!whole || order_all(m_->list[kept - 1].logit) >= kept) {
            return draw_from_list(kept, true);
        }
    }
    float low = m_->list[first - 1].logit;
    float step = std::max(0.02f, 0.125f * (largest_ - low));
    double wanted = (double) p * sum;
    for (int32_t i = 0; i < 24 && step > 1e-4f; ++i) {
        int32_t n = gather_above(low - step, LIST);
        if (n < 0) {
            step /= 2;
            continue;
        }
        low -= step;
        double reached = 0;
        for (int32_t j = 0; j < n; ++j) {
            reached += weight(m_->list[j].logit);
        }
        if (reached < wanted) {
            step *= 1.5f;
            continue;
        }
        n = order_all(low);
        kept = n < 0 ? n : nucleus(n, sum);
        if (kept >= 0 && (kept < n || n == row_.n)) {
            return draw_from_list(kept, true);
        }
        wanted *= 1.0001; // the end of the list: the float sum asks for a little more
    }
    return bracket((1 - (double) p) * total_);
}

// -- a large nucleus ------------------------------------------------------------------------------
// Two bounds between which it ends, from a sample; excluded: the weight below its end.
fused_row::pass fused_row::bracket(double excluded) {
    const int32_t stride = std::max(1, row_.n_full / SAMPLED);
    const float top = start_ > -INFINITY ? start_ : largest_;
    candidate * sample = m_->list.get();
    int32_t n = 0;
    float least = top;
    for (int32_t b = 0; b < row_.n_full; b += stride) {
        const float * x = row_.block(b);
        for (int32_t i = 0; i < BLOCK; ++i) {
            const bool in = x[i] > largest_ - 60 && x[i] < top;
            sample[n].logit = x[i];
            least = in ? std::min(least, x[i]) : least;
            n += in;
        }
    }
    low_ = -INFINITY;
    upper_ = INFINITY;
    if (slack_ < 1 && n > 0 && least < top) {
        int32_t count[N_BINS] = {};
        const bins scale(least, top, N_BINS);
        for (int32_t i = 0; i < n; ++i) {
            ++count[scale.of(sample[i].logit, N_BINS)];
        }
        double below = 0;
        int32_t b = 0;
        for (; b < N_BINS; ++b) {
            const double in_bin = count[b] * (double) stride * weight(scale.edge(b));
            if (below + in_bin > excluded * (1 - slack_)) {
                break;
            }
            below += in_bin;
        }
        low_ = b == 0 ? -INFINITY : scale.edge(b);
        for (; b < N_BINS && below < excluded * (1 + slack_); ++b) {
            below += count[b] * (double) stride * weight(scale.edge(b));
        }
        upper_ = b < N_BINS ? scale.edge(b) : INFINITY;
    }
    how_ = weighing(1, largest_, -INFINITY);
    return then(WEIGH_BOTH, &fused_row::after_bracket_weighing);
}

fused_row::pass fused_row::after_bracket_weighing() {
    total_ = total(m_->block_sum);
    const double above  = total(m_->upper_sum);
    const double target = r_->params->top_p * total_;
    const bool all = low_ == -INFINITY && upper_ == INFINITY;
    int32_t n = -1;
    if (above < target) {
        n = 0;
        candidate * list = m_->list.get();
        for (int32_t b = 0; b < row_.n_blocks; ++b) {
            if (!(m_->block_max[b] >= low_)) {
                continue;
            }
            const float * x = row_.block(b);
            uint64_t bits = k_->at_least(x, low_);
            if (upper_ < INFINITY) {
                bits &= ~k_->at_least(x, upper_);
            }
            for (; bits != 0; bits &= bits - 1) {
                const int32_t i = __builtin_ctzll(bits);
                if (x[i] > -INFINITY) {
                    list[n++] = {x[i], b * BLOCK + i};
                }
            }
        }
    }
    const cut edge = n < 0 ? cut() : nucleus_edge(n, above, target);
    if (!all && (n < 0 || edge.last_id < 0)) {
        slack_ *= 5; // the sample was off
        return bracket((1 - (double) r_->params->top_p) * total_);
    }
    return by_index(edge);
}

// Where `above` and the list, from its largest on, reach the target: cut() if nowhere. The weights
// of what is kept of the list join upper_sum.
cut fused_row::nucleus_edge(int32_t n, double above, double target) {
    candidate * list = m_->list.get();
    float least = INFINITY, most = -INFINITY;
    for (int32_t i = 0; i < n; ++i) {
        least = std::min(least, list[i].logit);
        most  = std::max(most, list[i].logit);
    }
    least = std::max(least, largest_ - 60);
    const bins scale(least, most, N_BINS);
    double sum[N_BINS] = {};
    for (int32_t i = 0; i < n; ++i) {
        sum[scale.of(list[i].logit, N_BINS)] += weight(list[i].logit);
    }
    int32_t bin = N_BINS - 1;
    while (bin > 0 && above + sum[bin] < target) {
        above += sum[bin--];
    }
    candidate * inside = m_->other.get();
    int32_t n_inside = 0;
    for (int32_t i = 0; i < n; ++i) {
        const int32_t at = scale.of(list[i].logit, N_BINS);
        if (at > bin) {
            m_->upper_sum[list[i].id / BLOCK] += weight(list[i].logit);
        } else if (at == bin) {
            inside[n_inside++] = list[i];
        }
    }
    std::sort(inside, inside + n_inside, by_logit_and_id);
    for (int32_t i = 0; i < n_inside; ++i) {
        const float w = weight(inside[i].logit);
        m_->upper_sum[inside[i].id / BLOCK] += w;
        above += w;
        if (above >= target) {
            return {inside[i].logit, inside[i].id};
        }
    }
    return cut();
}

} // namespace plb
