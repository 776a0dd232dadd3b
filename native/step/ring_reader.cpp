// The reader's side: from the ring to pages.
#include "step/engine.hpp"

#include <cstring>
#include <ctime>

using namespace plb;

namespace {

bool ends_text(const plb_result & result) {
    return result.finish == PLB_FINISH_EOG || result.finish == PLB_FINISH_STOP ||
           result.finish == PLB_FINISH_ERROR;
}

bool fits(plb_page & page, const plb_result * results, int32_t n) {
    bool ok = page.n_steps < page.n_steps_max;
    for (int32_t i = 0; i < n; ++i) {
        ok = ++page.n_tokens[results[i].seq] <= page.n_steps_max && ok;
    }
    for (int32_t i = 0; i < n; ++i) {
        --page.n_tokens[results[i].seq];
    }
    return ok;
}

void copy(const plb_engine & engine, const plb_result & result, size_t record, plb_page & page) {
    if (ends_text(result)) {
        return;
    }
    const size_t at = (size_t) result.seq * page.n_steps_max + page.n_tokens[result.seq]++;
    page.token[at] = result.token;
    page.step[at]  = page.n_steps;
    if (page.logprob != nullptr) {
        page.logprob[at] = result.logprob;
    }
    if (page.n_top != nullptr) {
        page.n_top[at] = result.n_top;
    }
    const size_t width = (size_t) engine.views.n_logprobs_max;
    if (page.top_token != nullptr) {
        memcpy(&page.top_token[at * width], &engine.top_token[record * width],
               (size_t) result.n_top * sizeof(llama_token));
    }
    if (page.top_logprob != nullptr) {
        memcpy(&page.top_logprob[at * width], &engine.top_logprob[record * width],
               (size_t) result.n_top * sizeof(float));
    }
}

} // namespace

int64_t plb_ring_wait(plb_engine * engine, int64_t n_wanted, int64_t timeout_ns) {
    if (engine == nullptr) {
        return PLB_E_ARGUMENT;
    }
    return engine->ring.wait(n_wanted, std::chrono::nanoseconds(std::max<int64_t>(timeout_ns, 0)));
}

int32_t plb_ring_read(plb_engine * engine, int64_t until, plb_page * page) {
    if (engine == nullptr || page == nullptr || page->steps == nullptr ||
        page->n_tokens == nullptr || page->token == nullptr || page->step == nullptr) {
        return PLB_E_ARGUMENT;
    }
    ring & ring = engine->ring;
    const int64_t first = ring.n_taken(), end = std::min(until, ring.n_published());
    int64_t step = first;
    for (; step < end; ++step) {
        const plb_step_info & info = engine->steps[ring.index(step)];
        const plb_result * results = &engine->results[info.first_result];
        if (!fits(*page, results, info.n_results)) {
            break;
        }
        for (int32_t i = 0; i < info.n_results; ++i) {
            copy(*engine, results[i], (size_t) info.first_result + i, *page);
        }
        page->steps[page->n_steps++] = info;
    }
    if (step > first) {
        ring.take(step - first);
    }
    return (int32_t) (step - first);
}

void plb_ring_flush(plb_engine * engine) {
    if (engine != nullptr) {
        engine->ring.plan(false);
        engine->ring.publish();
        engine->ring.wake_reader();
    }
}

void plb_ring_wake(plb_engine * engine) {
    if (engine != nullptr) {
        engine->ring.wake_reader();
    }
}

void plb_ring_yield(plb_engine * engine, int64_t timeout_ns) {
    if (engine != nullptr) {
        engine->ring.yield(std::chrono::nanoseconds(std::max<int64_t>(timeout_ns, 0)));
    }
}

int64_t plb_ring_count(plb_engine * engine) {
    return engine == nullptr ? 0 : engine->ring.n_published();
}

int64_t plb_now_ns(void) {
#ifdef __APPLE__ // where libc++'s steady_clock goes on while the Mac sleeps, and Python's perf_counter does not
    return (int64_t) clock_gettime_nsec_np(CLOCK_UPTIME_RAW);
#else
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
#endif
}
