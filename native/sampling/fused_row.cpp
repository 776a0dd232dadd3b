// One row from its logits to a token.
#include "sampling/fused.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace plb {

namespace {

constexpr float NEVER = -INFINITY;
constexpr int32_t GROUP = 64; // blocks

} // namespace

fused_row::pass fused_row::then(pass p, step after) {
    after_ = after;
    return current_ = p;
}

fused_row::pass fused_row::fail(int32_t code) {
    restore();
    r_->error = code;
    return current_ = NONE;
}

fused_row::pass fused_row::choose(llama_token token) {
    restore();
    r_->token = token;
    if (r_->params->n_logprobs >= 0) {
        r_->logprob = logprob(token);
    }
    return current_ = NONE;
}

void fused_row::start(fused_request & request) {
    r_ = &request;
    r_->error   = 0;
    r_->token   = LLAMA_TOKEN_NULL;
    r_->logprob = NAN;
    r_->n_top   = 0;
    bad_.store(false, std::memory_order_relaxed);
    n_patches_ = 0;
    n_list_ = 0;
    keep_ = cut();
    row_ = {r_->logits, m_->tail, m_->n_vocab, m_->n_vocab / BLOCK,
            (m_->n_vocab + BLOCK - 1) / BLOCK};
}

fused_row::pass fused_row::begin(fused_request & request) noexcept {
    start(request);
    if (r_->params->n_logprobs >= 0) {
        pad();
        return then(SCAN, &fused_row::after_raw_scan);
    }
    if (!patch()) {
        return fail(PLB_E_LOGITS);
    }
    pad();
    return then(SCAN, &fused_row::after_scan);
}

// The last block, when it is not full.
void fused_row::pad() {
    const int32_t left = row_.n - row_.n_full * BLOCK;
    if (left > 0) {
        std::fill(m_->tail, m_->tail + BLOCK, NEVER);
        memcpy(m_->tail, row_.x + (int64_t) row_.n_full * BLOCK, (size_t) left * sizeof(float));
    }
}

// Biases, exclusions and penalties, written into the row. False if a NaN or +inf was there.
bool fused_row::patch() {
    const plb_sampling & p = *r_->params;
    fused_state & state = *r_->state;
    float * x = r_->logits;
    bool good = true;
    const auto change = [&](llama_token token, float to) {
        good = good && x[token] < INFINITY;
        state.patches[n_patches_++] = {token, x[token]};
        x[token] = to;
    };
    for (size_t i = 0; i < r_->n_bias; ++i) {
        change(r_->bias[i].token, x[r_->bias[i].token] + r_->bias[i].bias);
    }
    for (const token_span & span : r_->never) {
        for (size_t i = 0; i < span.n; ++i) {
            change(span.token[i], NEVER);
        }
    }
    for (const penalty_window::entry & seen : state.window) {
        float to = x[seen.token];
        if (to <= 0) {
            to *= p.repeat_penalty;
        } else {
            to /= p.repeat_penalty;
        }
        to -= (float) seen.count * p.frequency_penalty + p.presence_penalty;
        change(seen.token, to);
    }
    return good;
}

void fused_row::restore() {
    for (; n_patches_ > 0; --n_patches_) {
        const fused_state::patch & change = r_->state->patches[n_patches_ - 1];
        r_->logits[change.token] = change.logit;
    }
}

void fused_row::run(pass p, int32_t first, int32_t last) noexcept {
    const float * top = m_->block_max.data();
    double * sum = m_->block_sum.data();
    switch (p) {
        case SCAN:
            if (k_->scan(row_, first, last, m_->block_max.data())) {
                bad_.store(true, std::memory_order_relaxed);
            }
            break;
        case WEIGH:
            k_->weigh(row_, first, last, top, how_, sum);
            break;
        case WEIGH_BOTH:
            k_->weigh_both(row_, first, last, top, how_, upper_, sum, m_->upper_sum.data());
            break;
        case NONE:
            break;
    }
}

float fused_row::largest() const {
    const std::vector<float> & top = m_->block_max;
    const size_t whole = top.size() / BLOCK * BLOCK;
    float value = whole > 0 ? k_->maximum(top.data(), (int32_t) whole) : NEVER;
    for (size_t b = whole; b < top.size(); ++b) {
        value = std::max(value, top[b]);
    }
    return value;
}

llama_token fused_row::first_largest() const {
    const float * top = m_->block_max.data();
    int32_t b = 0;
    while (b + BLOCK <= row_.n_blocks && at_least(top + b, largest_) == 0) {
        b += BLOCK;
    }
    while (top[b] < largest_) {
        ++b;
    }
    return b * BLOCK + __builtin_ctzll(at_least(row_.block(b), largest_));
}

// Also leaves the sums of GROUP blocks each.
double fused_row::total(const std::vector<double> & sums) {
    const size_t n = sums.size();
    double all = 0;
    for (size_t b = 0, group = 0; b < n; b += GROUP, ++group) {
        const size_t end = std::min(b + GROUP, n);
        double part[4] = {};
        size_t i = b;
        for (; i + 4 <= end; i += 4) {
            for (size_t j = 0; j < 4; ++j) {
                part[j] += sums[i + j];
            }
        }
        for (; i < end; ++i) {
            part[0] += sums[i];
        }
        m_->group_sum[group] = (part[0] + part[1]) + (part[2] + part[3]);
        all += m_->group_sum[group];
    }
    return all;
}

// As the chain computes it.
float fused_row::weight(float logit) const {
    return expf((how_.temp == 1 ? logit : logit / how_.temp) - how_.top);
}

// -- which way ------------------------------------------------------------------------------------
fused_row::pass fused_row::after_scan() {
    const plb_sampling & p = *r_->params;
    largest_ = largest();
    if (bad_.load(std::memory_order_relaxed) || largest_ == INFINITY) {
        return fail(PLB_E_LOGITS);
    }
    if (largest_ == NEVER) {
        restore();
        const bool any = std::any_of(row_.x, row_.x + row_.n, [](float x) { return x > NEVER; });
        return fail(any ? PLB_E_NO_CANDIDATE : PLB_E_LOGITS);
    }
    if (p.temperature == 0) {
        return choose(first_largest());
    }
    if (!std::isfinite(largest_ / p.temperature)) {
        return fail(PLB_E_LOGITS);
    }
    if (p.top_k > 0 && (p.top_k < row_.n || p.top_p < 1 || row_.n <= LIST)) {
        const int32_t n = take_top(std::min(p.top_k, row_.n));
        return draw_from_list(p.top_p < 1 ? nucleus(n) : n, true);
    }
    if (p.top_p < 1) {
        return by_top_p();
    }
    return by_index(cut());
}

// -- a list ---------------------------------------------------------------------------------------
// Top-p over the sorted list, in the chain's arithmetic: how many are left.
int32_t fused_row::nucleus(int32_t n) const {
    const candidate * list = m_->list.get();
    float sum = 0;
    for (int32_t i = 0; i < n; ++i) {
        sum += expf(list[i].logit - list[0].logit);
    }
    float reached = 0;
    for (int32_t i = 0; i < n; ++i) {
        reached += expf(list[i].logit - list[0].logit) / sum;
        if (reached >= r_->params->top_p) {
            return i + 1;
        }
    }
    return n;
}

// Min-p of a sorted list, temperature, draw.
fused_row::pass fused_row::draw_from_list(int32_t n, bool sorted) {
    const plb_sampling & p = *r_->params;
    candidate * list = m_->list.get();
    if (sorted && p.min_p > 0) {
        const float low = list[0].logit + logf(p.min_p);
        int32_t n_left = 1;
        while (n_left < n && !(list[n_left].logit < low)) {
            ++n_left;
        }
        n = n_left;
    }
    n_list_ = n;
    std::uniform_real_distribution<double> draw(0.0, 1.0);
    const double at = draw(r_->state->random);
    if (n == 1) {
        return choose(list[0].id);
    }
    how_ = weighing(p.temperature, largest_, NEVER);
    double sum = 0;
    for (int32_t i = 0; i < n; ++i) {
        list[i].logit = weight(list[i].logit);
        sum += list[i].logit;
    }
    const double target = sum * at;
    double reached = 0;
    int32_t chosen = -1;
    for (int32_t i = 0; i < n; ++i) {
        reached += list[i].logit;
        if (list[i].logit > 0) {
            chosen = i;
            if (reached >= target) {
                break;
            }
        }
    }
    return choose(list[chosen].id);
}

void fused_row::choose_from_shortlist(fused_request & request, const llama_token * ids,
                                      int32_t n) noexcept {
    r_ = &request;
    n_patches_ = 0;
    const plb_sampling & p = *r_->params;
    const auto excluded = [&](llama_token token) {
        return std::any_of(r_->never, r_->never + 3, [&](const token_span & span) {
            return std::find(span.token, span.token + span.n, token) != span.token + span.n;
        });
    };
    candidate * list = m_->list.get();
    int32_t n_left = 0;
    bool any = false;
    for (int32_t i = 0; i < n; ++i) {
        const float x = r_->logits[i];
        if (!(x < INFINITY)) {
            fail(PLB_E_LOGITS);
            return;
        }
        any = any || x > NEVER;
        if (x > NEVER && !excluded(ids[i])) {
            list[n_left++] = {x, ids[i]};
        }
    }
    if (n_left == 0) {
        fail(any ? PLB_E_NO_CANDIDATE : PLB_E_LOGITS);
        return;
    }
    const int32_t k = p.temperature == 0 ? 1 : std::min(p.top_k, n_left);
    std::partial_sort(list, list + k, list + n_left, by_logit_and_id);
    largest_ = list[0].logit;
    if (p.temperature == 0) {
        choose(list[0].id);
        return;
    }
    if (!std::isfinite(largest_ / p.temperature)) {
        fail(PLB_E_LOGITS);
        return;
    }
    draw_from_list(p.top_p < 1 ? nucleus(k) : k, true);
}

// -- in index order -------------------------------------------------------------------------------
// Min-p, temperature and draw of all candidates.
fused_row::pass fused_row::by_index(cut keep) {
    const plb_sampling & p = *r_->params;
    if (p.min_p > 0) {
        const float low = largest_ + logf(p.min_p);
        if (low > keep.logit) {
            keep = {low, row_.n};
            const bool sorted = p.top_p < 1 || p.top_k > 0; // the chain has sorted everything
            const int32_t n = gather_above(low, LIST);
            if (n > 0) {
                if (sorted) {
                    sort_list(n);
                }
                return draw_from_list(n, sorted);
            }
        }
    }
    keep_ = keep;
    std::uniform_real_distribution<double> draw(0.0, 1.0);
    draw_ = draw(r_->state->random);
    how_  = weighing(p.temperature, largest_, keep.logit);
    const bool cut_inside = keep_.last_id >= 0 && keep_.last_id < row_.n;
    if (p.temperature == 1 && cut_inside) {
        m_->block_sum.swap(m_->upper_sum); // top-p has just weighed what it keeps
        return draw_weighed();
    }
    return then(WEIGH, cut_inside ? &fused_row::draw_from_edge_weighed : &fused_row::draw_weighed);
}

// The sums are of all that equals the nucleus's last logit, inside or not.
fused_row::pass fused_row::draw_from_edge_weighed() {
    const float above = std::nextafter(keep_.logit, INFINITY);
    for (int32_t b = keep_.last_id / BLOCK; b < row_.n_blocks; ++b) {
        const float * x = row_.block(b);
        if (m_->block_max[b] >= keep_.logit &&
            (at_least(x, keep_.logit) & ~at_least(x, above)) != 0) {
            double sum = 0;
            for (int32_t i = 0; i < BLOCK; ++i) {
                sum += keep_.keeps(x[i], b * BLOCK + i) ? weight(x[i]) : 0;
            }
            m_->block_sum[b] = sum;
        }
    }
    return draw_weighed();
}

// Through the sums of groups and blocks to the token that the draw falls on.
fused_row::pass fused_row::draw_weighed() {
    const double target = total(m_->block_sum) * draw_;
    double reached = 0;
    for (int32_t b = 0; b < row_.n_blocks; ++b) {
        const double group = m_->group_sum[b / GROUP];
        if (b % GROUP == 0 && (reached + group < target || group == 0)) {
            reached += group;
            b += GROUP - 1;
            continue;
        }
        const double sum = m_->block_sum[b];
        if (reached + sum < target || sum == 0) {
            reached += sum;
            continue;
        }
        const float * x = row_.block(b);
        llama_token last = LLAMA_TOKEN_NULL; // where the weights' sum is rounded below the block's
        for (uint64_t bits = at_least(x, how_.low); bits != 0; bits &= bits - 1) {
            const int32_t i = __builtin_ctzll(bits);
            const float w = keep_.keeps(x[i], b * BLOCK + i) ? weight(x[i]) : 0;
            reached += w;
            last = w > 0 ? b * BLOCK + i : last;
            if (w > 0 && reached >= target) {
                return choose(last);
            }
        }
        if (last != LLAMA_TOKEN_NULL) {
            return choose(last);
        }
    }
    return choose(first_largest()); // it fell behind everything
}

} // namespace plb
