// Where a step's candidates are chosen: by the device (native/device/shortlist.hpp), or by the host from
// whole rows of logits. What is cheaper depends on the device, the vocabulary and the number of
// rows, so it is measured: eight steps each way on the batch that is there. Rows on the host cost in
// proportion, the device's choice mostly a constant, so where it pays for n rows it pays for more.
// A device with memory of its own has all rows of logits to send: there it pays from the first row on
// (bench/results, NVIDIA H200: 2.09 to 2.13 ms at one row, 6.6 to 7.6 at 64), and is not tried out.
#pragma once

#include <array>
#include <cstdint>

namespace plb {

class placement {
public:
    // mode: enum plb_device_sampling; known: that the device is cheaper
    explicit placement(int32_t mode, bool known = false)
        : mode_(mode), calm_wanted_(known ? 1 : CALM), cheaper_from_(known ? 1 : INT32_MAX) {}

    // For the step that is about to be decoded. able: all its rows can be sampled either way.
    bool on_device(int32_t n_rows, bool able);
    // What a step of nothing but sampled rows took.
    void took(int32_t n_rows, bool on_device, int64_t ns);
    // The device can't: never again.
    void refuse() { mode_ = 0; on_ = false; }

    int32_t cheaper_from() const { return cheaper_from_; } // rows; INT32_MAX: not known to be

private:
    static constexpr int32_t N_TIMES  = 8;
    static constexpr int32_t N_FIRST  = 4;    // steps after a change that rebuild graphs
    static constexpr int32_t CALM     = 8;    // steps that could before one does
    static constexpr int32_t CALM_MAX = 2048;

    struct times {
        std::array<int64_t, N_TIMES> ns;
        int32_t n_rows = 0, n = 0;

        void    add(int32_t rows, int64_t time);
        bool    full() const { return n >= N_TIMES; }
        int64_t median() const;
    };

    void leave();

    int32_t mode_;
    bool    on_ = false;
    int32_t calm_ = 0, calm_wanted_, n_on_ = 0, n_few_ = 0;
    int32_t cheaper_from_, dearer_to_ = 0;
    times   host_, device_;
    int32_t trial_ = 0; // rows that are tried out, 0: none
};

} // namespace plb
