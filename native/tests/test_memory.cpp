// Out of memory at every allocation of a call, one after another: the call fails with a code and a text, nothing else has changed, and the next try succeeds.
#include "check.hpp"

#include <functional>
#include <new>
#include <string>

#if defined(__GNUC__)
#define NOINLINE __attribute__((noinline)) // inlined, malloc behind new draws a warning
#else
#define NOINLINE
#endif

namespace {

// Of this thread: the allocation that fails, counted from now on; 0: none.
thread_local long countdown = 0;
thread_local bool failed    = false;

} // namespace

// All of C++ in this process, libllama included where its symbols are shared.
NOINLINE void * operator new(size_t size) {
    if (countdown > 0 && --countdown == 0) {
        failed = true;
        throw std::bad_alloc();
    }
    if (void * p = malloc(size ? size : 1)) {
        return p;
    }
    throw std::bad_alloc();
}
NOINLINE void operator delete(void * p) noexcept { free(p); }
NOINLINE void operator delete(void * p, size_t) noexcept { free(p); }

namespace {

constexpr long MOST = 200000;

// `call` with its first, second, … allocation failing, until it needs no more of them. It returns
// whether it has succeeded, and looks itself whether a failure is a proper one. Some allocations
// may fail without harm (a hint, a log line), so a success is no error. Returns how many there are.
long walk(const char * name, const std::function<bool()> & call) {
    long n = 0, n_failed = 0;
    for (;; ++n) {
        CHECK(n < MOST);
        failed    = false;
        countdown = n + 1;
        const bool done = call();
        countdown = 0;
        n_failed += !done;
        if (!failed) {
            CHECK(done);
            break;
        }
    }
    printf("%-28s %6ld allocations, %6ld failures\n", name, n, n_failed);
    return n;
}

bool done(int32_t code, const char * text) {
    if (code == PLB_OK) {
        return true;
    }
    // libllama's parser of grammars takes what it throws for a mistake in the grammar.
    CHECK(code == PLB_E_MEMORY || code == PLB_E_GRAMMAR);
    CHECK(text[0] != '\0');
    return false;
}

void engines(fixture & f) {
    plb_engine_params params = plb_engine_default_params();
    params.n_logprobs_max = 4;
    params.n_threads      = 3;
    params.n_steps_max    = 8;
    params.n_draft_max    = 2;
    params.drafter        = PLB_DRAFTER_NGRAM;
    params.device_sampling = PLB_DEVICE_SAMPLING_ON;
    CHECK(walk("plb_engine_new", [&] {
        plb_engine * made = nullptr;
        const int32_t code = plb_engine_new(f.ctx, &params, &made);
        CHECK((code == PLB_OK) == (made != nullptr));
        if (made != nullptr) {
            plb_engine_detach(made);
        }
        plb_engine_free(made);
        return done(code, "memory"); // there is no engine yet that could have a text
    }) > 20);
}

struct request {
    const char * name;
    plb_sampling sampling;
};

std::vector<request> requests() {
    static const llama_logit_bias bias[] = {{5, 2.0f}, {6, -2.0f}};
    static const llama_token stops[] = {7, 9};
    static const char * const patterns[] = {"x+y"};
    static const llama_token triggers[] = {11};
    static plb_grammar_start start = {};
    start.lazy       = 1;
    start.n_patterns = 1;
    start.patterns   = patterns;
    start.n_tokens   = 1;
    start.tokens     = triggers;
    plb_sampling plain = plb_sampling_default();
    plain.max_tokens = 20;
    plain.seed       = 1;
    plb_sampling much = plain;
    much.n_logit_bias   = 2;
    much.logit_bias     = bias;
    much.n_stop_tokens  = 2;
    much.stop_tokens    = stops;
    much.repeat_penalty = 1.1f;
    much.penalty_last_n = 32;
    much.n_logprobs     = 2;
    plb_sampling chain = plain;
    chain.typical_p = 0.9f;
    plb_sampling grammar = plain;
    grammar.grammar = "root ::= item+\nitem ::= [a-z]{1,3} | \"(\" item \")\"";
    plb_sampling lazy = grammar;
    lazy.grammar_start = &start;
    return {{"plain", plain}, {"bias, stops, penalties", much}, {"chain", chain},
            {"grammar", grammar}, {"lazy grammar", lazy}};
}

void slots(fixture & f, const request & each) {
    const std::vector<llama_token> prompt = {1, 20, 40, 60};
    char error[256] = "";
    walk((std::string("plb_slot_new: ") + each.name).c_str(), [&] {
        plb_slot * slot = nullptr;
        const int32_t code = plb_slot_new(f.engine, &each.sampling, prompt.data(), 4, &slot, error,
                                          sizeof error);
        CHECK((code == PLB_OK) == (slot != nullptr));
        plb_slot_free(slot);
        return done(code, error);
    });
    walk((std::string("plb_slot_set: ") + each.name).c_str(), [&] {
        return done(plb_slot_set(f.engine, 0, &each.sampling, prompt.data(), 4),
                    plb_last_error(f.engine));
    });
    walk((std::string("plb_slot_copy: ") + each.name).c_str(), [&] {
        CHECK_EQ(plb_slot_clear(f.engine, 1), PLB_OK);
        const bool copied = done(plb_slot_copy(f.engine, 0, 1), plb_last_error(f.engine));
        plb_slot_info info = {};
        CHECK((plb_slot_get_info(f.engine, 1, &info) == PLB_OK) == copied); // whole or not there
        return copied;
    });
}

// Slot 0 fails alone where it needs memory to sample, as the grammar does; slot 1 samples all the same.
void steps(fixture & f, const request & each) {
    const std::vector<llama_token> prompt = {1, 20, 40, 60};
    const plb_sampling plain = requests().front().sampling;
    walk((std::string("plb_step: ") + each.name).c_str(), [&] {
        const long at = countdown;
        countdown = 0;
        llama_memory_clear(llama_get_memory(f.ctx), true);
        CHECK_EQ(plb_slot_set(f.engine, 0, &each.sampling, nullptr, 0), PLB_OK);
        CHECK_EQ(plb_slot_set(f.engine, 1, &plain, nullptr, 0), PLB_OK);
        f.prompt(0, prompt, 0);
        f.prompt(4, prompt, 1);
        countdown = at;
        const int32_t code = plb_step(f.engine, 8);
        countdown = 0;
        if (code != PLB_OK) { // libllama's own allocations: the step was not computed
            CHECK(plb_last_error(f.engine)[0] != '\0');
            return false;
        }
        CHECK_EQ(f.views.info->n_results, 2);
        const bool sampled = f.views.results[0].finish != PLB_FINISH_ERROR;
        if (!sampled) {
            CHECK(plb_slot_error(f.engine, 0)[0] != '\0');
        }
        CHECK(f.views.results[1].finish != PLB_FINISH_ERROR || sampled); // one of them at most
        return sampled && f.views.results[1].finish != PLB_FINISH_ERROR;
    });
}

} // namespace

int main(int argc, char ** argv) {
    plb_guard_install();
    plb_engine_params params = plb_engine_default_params();
    params.n_logprobs_max = 4;
    params.n_threads      = 1; // all that a step needs is of this thread
    fixture f(model_path(argc, argv), 128, 2, params);
    engines(f);
    for (const request & each : requests()) {
        slots(f, each);
        steps(f, each);
    }
    return 0;
}
