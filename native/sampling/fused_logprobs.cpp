// Log-probabilities of a row as it came: before biases, exclusions and penalties.
#include "sampling/fused.hpp"

#include <algorithm>
#include <cmath>

namespace plb {

bool fused_row::good_raw_row() {
    largest_ = largest();
    how_ = weighing(1, largest_, -INFINITY);
    return !bad_.load(std::memory_order_relaxed) && std::isfinite(largest_);
}

void fused_row::note_logprobs() {
    norm_ = largest_ + std::log(total(m_->block_sum));
    const int32_t wanted = std::min(r_->params->n_logprobs, row_.n);
    if (wanted > 0) {
        r_->n_top = take_top(wanted);
        const candidate * list = m_->list.get();
        for (int32_t i = 0; i < r_->n_top; ++i) {
            r_->top_token[i]   = list[i].id;
            r_->top_logprob[i] = (float) (list[i].logit - norm_);
        }
    }
}

void fused_row::look_at(fused_request & request) noexcept {
    start(request);
    pad();
    run(SCAN, 0, row_.n_blocks);
    if (!good_raw_row()) {
        fail(PLB_E_LOGITS);
    } else if (r_->params->n_logprobs >= 0) {
        run(WEIGH, 0, row_.n_blocks);
        note_logprobs();
    }
}

fused_row::pass fused_row::after_raw_scan() {
    return good_raw_row() ? then(WEIGH, &fused_row::after_raw_weighing) : fail(PLB_E_LOGITS);
}

fused_row::pass fused_row::after_raw_weighing() {
    note_logprobs();
    if (!patch()) {
        return fail(PLB_E_LOGITS);
    }
    if (n_patches_ == 0) {
        return after_scan();
    }
    pad();
    return then(SCAN, &fused_row::after_scan);
}

} // namespace plb
