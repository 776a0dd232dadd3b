// Top-p over the whole vocabulary.
//
// Where the nucleus is small, its candidates become a list in the chain's order, and the chain's own
// float arithmetic decides where it ends: that needs its running float sum over all the weights, with
// the rounding of each of its additions (running_sum). Where it is large, its end is found between two
// bounds that a sample of the row suggests and one pass over all weights confirms.
#include "sampling/fused.hpp"

#include <algorithm>
#include <cmath>

namespace plb {

namespace {

constexpr int32_t FIRST_TRY = 256;  // the chain's first sort is for as many
constexpr int32_t SMALL     = 1024; // a nucleus up to here is certainly made a list
constexpr int32_t N_BINS    = 1024;
constexpr int32_t SAMPLED   = 128;  // blocks
constexpr double  SUM_ERROR = 0.03; // more than a float sum of 2^19 terms is off by
constexpr float   GRID_ERROR = 2e-6f; // of a float sum of weights that are not the chain's

// Equal steps of the logit from low to high.
struct bins {
    float low, step, scale;

    bins(float low, float high)
        : low(low), step((high - low) / N_BINS), scale(N_BINS / (high - low)) {
        if (!std::isfinite(scale)) {
            step = scale = 0;
        }
    }
    int32_t of(float x) const {
        return (int32_t) std::max(0.0f, std::min((float) (N_BINS - 1), (x - low) * scale));
    }
    float edge(int32_t bin) const { return low + (float) bin * step; }
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
    const int32_t kept = nucleus(n, sum);
    return draw_from_list(kept > 0 ? kept : n, true);
}

fused_row::pass fused_row::by_top_p() {
    how_   = weighing(1, largest_, -INFINITY);
    start_ = top_block(FIRST_TRY);
    tries_ = 0;
    exactly_ = false;
    on_grid_ = true; // to be on the safe side
    list_end_ = start_;
    if (start_ == -INFINITY) {
        return make_list(); // a vocabulary of few blocks
    }
    const int32_t n = gather_above(start_, LIST);
    above_start_ = n < 0 ? SMALL : 0; // so many alike that SMALL of them may weigh as much
    for (int32_t i = 0; i < n; ++i) {
        above_start_ += weight(m_->list[i].logit);
    }
    // a guess at the sum: what is above start_, and a sample of what is below
    const int32_t stride = std::max(1, row_.n_full / (4 * SAMPLED));
    double below = 0, squares = 0;
    int32_t sampled = 0;
    for (int32_t b = 0; b < row_.n_full; b += stride) {
        k_->weigh_both(row_, b, b + 1, m_->block_max.data(), how_, start_, m_->block_sum.data(),
                       m_->upper_sum.data());
        const double sum = m_->block_sum[b] - m_->upper_sum[b];
        below += sum;
        squares += sum * sum;
        ++sampled;
    }
    const double variance = std::max(0.0, squares / sampled - below / sampled * (below / sampled));
    total_ = above_start_ + below * stride;
    guess_error_ = std::sqrt(variance * sampled) * stride / total_;
    const double p = r_->params->top_p;
    if (above_start_ > (1 - SUM_ERROR - 3 * guess_error_) * p * total_) {
        return make_list();
    }
    return bracket();
}

// A small nucleus, as it seems.
fused_row::pass fused_row::make_list() {
    upper_ = INFINITY;
    return weigh_on_grid(&fused_row::after_list_grid);
}

// Where the pass may be cut into parts, each has to know the sum before it.
fused_row::pass fused_row::weigh_on_grid(step after) {
    after_grid_ = after;
    return split_ ? then(WEIGH, &fused_row::after_split_weighing) : then(WEIGH_ON_GRID, after);
}

fused_row::pass fused_row::after_split_weighing() {
    double sum = 0;
    for (int32_t b = 0; b < row_.n_blocks; ++b) {
        m_->before[b] = sum;
        sum += m_->block_sum[b];
    }
    return then(WEIGH_ON_GRID, after_grid_);
}

// The float sum of all weights, added up one after the other as the chain does it. While the sum
// stays in [base, 2 base), each addition moves it along one grid, by the weight rounded to that grid:
// the kernel has added these up. Where that may not hold, the block is added up here.
float fused_row::running_sum() {
    const float * base = m_->base.data();
    const float * grid = m_->grid.data();
    const auto stays = [&](int32_t b, float sum, float after) {
        return base[b] > 0 && sum >= base[b] && after < 2 * base[b]; // false for a NaN
    };
    float sum = 0;
    for (int32_t b = 0, n; b < row_.n_blocks; b += n) {
        if (b + 4 <= row_.n_blocks && base[b] == base[b + 3] && base[b] == base[b + 1] &&
            base[b] == base[b + 2]) {
            const float after = sum + ((grid[b] + grid[b + 1]) + (grid[b + 2] + grid[b + 3]));
            if (stays(b, sum, after)) {
                sum = after;
                n = 4;
                continue;
            }
        }
        n = 1;
        if (!stays(b, sum, sum + grid[b])) { // on the right grid, if it stays on one
            k_->weigh_on_grid(row_, b, b + 1, how_, exactly_, upper_, sum, m_->block_sum.data(),
                              m_->upper_sum.data(), m_->base.data(), m_->grid.data());
        }
        if (stays(b, sum, sum + grid[b])) {
            sum += grid[b];
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

// The chain's nucleus of the list: how many it keeps, 0 if the list ends before, -1 if it takes a
// sum of exact weights to tell.
int32_t fused_row::list_nucleus(int32_t n, float sum) const {
    const int32_t kept = nucleus(n, sum);
    if (!exactly_ && (nucleus(n, sum * (1 - GRID_ERROR)) != kept ||
                      nucleus(n, sum * (1 + GRID_ERROR)) != kept)) {
        return -1;
    }
    return kept == 0 && n == row_.n ? n : kept;
}

fused_row::pass fused_row::after_list_grid() {
    const float sum = running_sum();
    total_ = total(m_->block_sum);
    guess_error_ = 0;
    const int32_t first = std::min(FIRST_TRY, row_.n);
    order_top(first);
    int32_t kept = list_nucleus(first, sum);
    float low  = list_end_ < start_ ? list_end_ : m_->list[first - 1].logit;
    float step = list_end_ < start_ ? 0 : std::max(0.02f, 0.1f * (largest_ - low));
    for (int32_t i = 0; i < 16 && kept == 0; ++i) {
        int32_t n = gather_above(low - step, 4 * SMALL);
        if (n < 0) {
            step /= 2;
            continue;
        }
        low -= step;
        step = std::max(0.02f, step * 1.5f);
        if (!sort_list(n, n)) {
            n = order_all(low); // the order of equal ones is the chain's business
        }
        kept = n < 0 ? 0 : list_nucleus(n, sum);
    }
    if (kept < 0) {
        exactly_ = true;
        return make_list();
    }
    return kept > 0 ? draw_from_list(kept, true) : bracket();
}

// Two bounds between which a large nucleus ends, from a sample.
fused_row::pass fused_row::bracket() {
    const double p = r_->params->top_p;
    const double excluded = (1 - p) * total_;
    // the sample's own error, and that of total_
    const double slack = (0.05 + 2 * guess_error_) * (1 << 2 * tries_);
    low_   = -INFINITY;
    upper_ = INFINITY;
    if (tries_++ < 2) {
        const int32_t stride = std::max(1, row_.n_full / SAMPLED);
        const float top = start_ > -INFINITY ? start_ : largest_;
        float least = top;
        for (int32_t i = 0; i < row_.n_full * BLOCK; i += stride * BLOCK + 8) {
            least = std::min(least, row_.x[i]);
        }
        const bins scale(std::max(least, largest_ - 60), top);
        int32_t count[N_BINS] = {};
        for (int32_t b = 0; b < row_.n_full; b += stride) {
            const float * x = row_.block(b);
            for (int32_t i = 0; i < BLOCK; ++i) {
                ++count[scale.of(x[i])];
            }
        }
        const double ratio = std::exp((double) scale.step);
        double w = std::exp((double) (scale.low + scale.step / 2 - largest_)) * stride, below = 0;
        int32_t b = 0;
        for (; b < N_BINS && below + count[b] * w <= excluded * (1 - slack); ++b, w *= ratio) {
            below += count[b] * w;
        }
        low_ = b == 0 ? -INFINITY : scale.edge(b);
        for (; b < N_BINS && below < excluded * (1 + slack); ++b, w *= ratio) {
            below += count[b] * w;
        }
        upper_ = b < N_BINS ? scale.edge(b) : INFINITY;
        // it may be small after all
        int32_t above = FIRST_TRY / 2;
        for (int32_t i = N_BINS - 2; i >= b && above <= 2 * SMALL; --i) {
            above += count[i] * stride;
        }
        if (guess_error_ > 0 && above <= 2 * SMALL) { // twice: the sample may be wrong about it
            list_end_ = low_;
            return make_list();
        }
        // weights below half a step of the chain's float sum are lost to it
        double lost = 0;
        w = std::exp((double) (scale.low + scale.step / 2 - largest_)) * stride;
        for (int32_t i = 0; i < N_BINS && w < 6e-8 * total_ * stride; ++i, w *= ratio) {
            lost += count[i] * w;
        }
        on_grid_ = lost > 1e-5 * (1 - p) * total_;
    }
    how_ = weighing(1, largest_, -INFINITY);
    return on_grid_ ? weigh_on_grid(&fused_row::after_bracket_weighing)
                    : then(WEIGH_BOTH, &fused_row::after_bracket_weighing);
}

fused_row::pass fused_row::after_bracket_weighing() {
    const float sum = on_grid_ ? running_sum() : 0;
    total_ = total(m_->block_sum);
    guess_error_ = 0;
    const double above  = total(m_->upper_sum);
    const double target = r_->params->top_p * (on_grid_ ? (double) sum : total_);
    cut edge;
    if (above < target) {
        int32_t n = 0;
        candidate * list = m_->list.get();
        for (int32_t b = 0; b < row_.n_blocks; ++b) {
            if (!(m_->block_max[b] >= low_)) {
                continue;
            }
            const float * x = row_.block(b);
            for (uint64_t bits = k_->between(x, low_, upper_); bits != 0; bits &= bits - 1) {
                const int32_t i = __builtin_ctzll(bits);
                list[n] = {x[i], b * BLOCK + i};
                n += x[i] > -INFINITY;
            }
        }
        edge = nucleus_edge(n, above, target);
    }
    if (edge.last_id < 0 && (low_ > -INFINITY || upper_ < INFINITY)) {
        return bracket(); // the sample was off
    }
    return by_index(edge);
}

// Where `above` and the list, from its largest on, reach the target: cut() if nowhere. The weights
// of what is kept of the list join upper_sum.
cut fused_row::nucleus_edge(int32_t n, double above, double target) {
    candidate * list = m_->list.get();
    candidate * weighed = m_->other.get();
    float least = low_, most = upper_;
    if (!std::isfinite(low_) || !std::isfinite(upper_)) {
        least = INFINITY, most = -INFINITY;
        for (int32_t i = 0; i < n; ++i) {
            least = std::min(least, list[i].logit);
            most  = std::max(most, list[i].logit);
        }
    }
    const bins scale(std::max(least, largest_ - 60), most);
    double sum[N_BINS] = {};
    for (int32_t i = 0; i < n; i += BLOCK) {
        float x[BLOCK], e[BLOCK];
        for (int32_t j = 0; j < BLOCK; ++j) {
            x[j] = i + j < n ? list[i + j].logit : -INFINITY;
        }
        k_->weights(x, how_, e);
        for (int32_t j = 0; j < BLOCK; ++j) {
            const int32_t bin = scale.of(x[j]);
            weighed[i + j] = {e[j], bin};
            sum[bin] += e[j];
        }
    }
    int32_t bin = N_BINS - 1;
    while (bin > 0 && above + sum[bin] < target) {
        above += sum[bin--];
    }
    int32_t n_inside = 0;
    for (int32_t i = 0; i < n; ++i) {
        m_->upper_sum[list[i].id / BLOCK] += weighed[i].id > bin ? weighed[i].logit : 0;
        list[n_inside] = list[i];
        n_inside += weighed[i].id == bin;
    }
    if (n_inside > 0) {
        sort_list(n_inside, 0);
        list = m_->list.get();
    }
    for (int32_t i = 0; i < n_inside; ++i) {
        const float w = weight(list[i].logit);
        m_->upper_sum[list[i].id / BLOCK] += w;
        above += w;
        if (above >= target) {
            return {list[i].logit, list[i].id};
        }
    }
    return cut();
}

} // namespace plb
