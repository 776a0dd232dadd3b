// Top-p over the whole vocabulary, with no sort of it. The nucleus ends between two bounds that a guess
// suggests; one pass over the row weighs everything, and what is above the upper bound; only the
// candidates between the bounds are looked at one by one. Where the guess was wrong, the next one knows
// the sum of all weights.
#include "sampling/fused.hpp"

#include <algorithm>
#include <cmath>

namespace plb {

namespace {

constexpr int32_t FIRST_TRY = 256; // a small nucleus ends among about so many of the largest
constexpr int32_t N_BINS    = 1024;
constexpr int32_t SAMPLED   = 128; // blocks of which a histogram is made; of the sums four times as many
constexpr int32_t N_GUESSES = 3;

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

fused_row::pass fused_row::by_top_p() {
    how_ = weighing(1, largest_, -INFINITY);
    // what is above start_ one by one, and a sample of what is below
    start_ = top_block(FIRST_TRY);
    const int32_t n = gather_above(start_, LIST);
    start_ = n < 0 ? INFINITY : start_; // too many alike
    above_start_ = 0;
    for (int32_t i = 0; i < n; ++i) {
        above_start_ += weight(m_->list[i].logit);
    }
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
    const double mean = below / std::max(1, sampled);
    total_ = above_start_ + below * stride;
    guess_error_ = std::sqrt(std::max(0.0, squares - mean * below)) * stride / total_;
    tries_ = 0;
    return weigh_between_bounds();
}

fused_row::pass fused_row::weigh_between_bounds() {
    low_   = -INFINITY;
    upper_ = INFINITY;
    if (tries_++ < N_GUESSES) {
        if (above_start_ >= (1 - 3 * guess_error_) * r_->params->top_p * total_) {
            low_ = start_;
        } else {
            guess_bounds();
        }
    }
    how_ = weighing(1, largest_, -INFINITY);
    return then(WEIGH_BOTH, &fused_row::after_weighing_both);
}

// From a histogram of a sample: from its lower end on, until what top-p leaves out is reached.
void fused_row::guess_bounds() {
    const double excluded = (1 - r_->params->top_p) * total_;
    // the sample's own error, and that of total_
    const double slack = (0.05 + 2 * guess_error_) * (1 << 2 * (tries_ - 1));
    const int32_t stride = std::max(1, row_.n_full / SAMPLED);
    const float top = std::isfinite(start_) ? start_ : largest_;
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
}

fused_row::pass fused_row::after_weighing_both() {
    total_ = total(m_->block_sum);
    guess_error_ = 0;
    const double above  = total(m_->upper_sum);
    const double target = r_->params->top_p * total_;
    cut edge;
    if (above < target || upper_ == INFINITY) {
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
        return weigh_between_bounds(); // the guess was wrong
    }
    return draw_from_nucleus(edge);
}

// Where `above` and the list, from its largest on, reach the target: cut() if nowhere. The weights
// of what the nucleus has of the list join upper_sum.
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
    while (bin > 0 && (sum[bin] == 0 || above + sum[bin] < target)) {
        above += sum[bin--];
    }
    int32_t n_inside = 0;
    for (int32_t i = 0; i < n; ++i) {
        m_->upper_sum[list[i].id / BLOCK] += weighed[i].id > bin ? weighed[i].logit : 0;
        list[n_inside] = list[i];
        n_inside += weighed[i].id == bin;
    }
    if (n_inside > 0) {
        sort_list(n_inside);
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

// A small nucleus becomes a list in the chain's order; a large one is drawn from in index order.
fused_row::pass fused_row::draw_from_nucleus(cut edge) {
    const int32_t n = gather_above(edge.logit, SMALL);
    if (n < 0) {
        return by_index(edge);
    }
    candidate * list = m_->list.get();
    const candidate * end = std::remove_if(list, list + n, [=](const candidate & c) {
        return !edge.keeps(c.logit, c.id);
    });
    const auto n_left = (int32_t) (end - list);
    sort_list(n_left);
    return draw_from_list(n_left, true);
}

} // namespace plb
