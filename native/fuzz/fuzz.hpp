// What the fuzzers share: the model named by PLB_TEST_MODEL, and the limits that Python keeps.
#pragma once

#include "tests/check.hpp"

#include <sys/time.h>

#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <string>

constexpr int DEPTH_MAX = 64; // pyllamabatch/llama/json_limits.py

// An input that takes longer is found. Of CPU time: on busy cores libFuzzer's own clock finds any.
class time_limit {
public:
    time_limit() {
        std::signal(SIGPROF, [](int) { std::abort(); });
        set(SECONDS);
    }
    ~time_limit() { set(0); }

private:
    static constexpr time_t SECONDS = 120; // unoptimised, with AddressSanitizer

    static void set(time_t seconds) {
        itimerval timer = {};
        timer.it_value.tv_sec = seconds;
        setitimer(ITIMER_PROF, &timer, nullptr);
    }
};

inline fixture & shared_fixture() {
    static fixture f(model_path(0, nullptr), 64, 2, plb_engine_default_params());
    return f;
}

// Whether the brackets of a JSON text are nested no deeper than Python lets through.
inline bool is_shallow(const std::string & text) {
    int depth = 0;
    bool in_string = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (in_string) {
            i += c == '\\';
            in_string = c != '"';
        } else if (c == '"') {
            in_string = true;
        } else if (c == '[' || c == '{') {
            if (++depth > DEPTH_MAX) {
                return false;
            }
        } else {
            depth -= c == ']' || c == '}';
        }
    }
    return true;
}

// A slot with this grammar, which takes a few of the tokens that it allows.
inline void use_grammar(const char * grammar) {
    fixture & f = shared_fixture();
    plb_sampling sampling = plb_sampling_default();
    sampling.grammar    = grammar;
    sampling.max_tokens = 8;
    if (plb_slot_set(f.engine, 0, &sampling, nullptr, 0) != PLB_OK) {
        CHECK(plb_last_error(f.engine)[0] != '\0');
        return;
    }
    llama_memory_clear(llama_get_memory(f.ctx), true);
    f.row(0, 1, 0, 0, PLB_ROW_SAMPLE);
    for (int32_t pos = 1; plb_step(f.engine, 1) == PLB_OK && pos < 4; ++pos) {
        plb_slot_info info = {};
        CHECK_EQ(plb_slot_get_info(f.engine, 0, &info), PLB_OK);
        if (f.views.results[0].finish != PLB_FINISH_NONE) {
            break;
        }
        f.row(0, f.views.results[0].token, pos, 0, PLB_ROW_SAMPLE);
    }
    CHECK_EQ(plb_slot_clear(f.engine, 0), PLB_OK);
}
