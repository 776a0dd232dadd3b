#include "device/placement.hpp"

#include "plb.h"

#include <algorithm>

namespace plb {

void placement::times::add(int32_t rows, int64_t time) {
    if (rows != n_rows) {
        n_rows = rows;
        n      = 0;
    }
    ns[(size_t) (n++ % N_TIMES)] = time;
}

int64_t placement::times::median() const {
    std::array<int64_t, N_TIMES> sorted = ns;
    std::nth_element(sorted.begin(), sorted.begin() + N_TIMES / 2, sorted.end());
    return sorted[N_TIMES / 2];
}

// A change costs some steps' time: the more often it has to be undone, the rarer it is.
void placement::leave() {
    if (on_ && n_on_ < CALM_MAX) {
        calm_wanted_ = std::clamp(2 * calm_wanted_, CALM, CALM_MAX);
    }
    on_   = false;
    calm_ = trial_ = 0;
}

bool placement::on_device(int32_t n_rows, bool able) {
    if (mode_ != PLB_DEVICE_SAMPLING_AUTO) {
        return able && mode_ == PLB_DEVICE_SAMPLING_ON;
    }
    if (!able) {
        leave();
        return false;
    }
    calm_ = std::min(calm_ + 1, CALM_MAX);
    if (on_) {
        n_few_ = n_rows <= dearer_to_ ? n_few_ + 1 : 0;
        if (n_few_ > 4 * CALM) {
            on_    = false;
            trial_ = 0;
        } else if (n_on_++ == CALM_MAX) {
            calm_wanted_ = CALM;
        }
        return on_;
    }
    if (calm_ < calm_wanted_ || n_rows <= dearer_to_) {
        return false;
    }
    const bool known = n_rows >= cheaper_from_;
    if (known || (host_.n_rows == n_rows && host_.full())) {
        on_     = true;
        n_on_   = n_few_ = 0;
        trial_  = known ? 0 : n_rows;
        device_ = {};
    }
    return on_;
}

void placement::took(int32_t n_rows, bool on_device, int64_t ns) {
    if (mode_ != PLB_DEVICE_SAMPLING_AUTO) {
        return;
    }
    if (!on_device) {
        host_.add(n_rows, ns);
        return;
    }
    if (trial_ == 0) {
        return;
    }
    if (n_rows >= cheaper_from_) {
        trial_ = 0; // as is known by now: it stays
        return;
    }
    if (n_rows != trial_) { // the batch has changed meanwhile: another time
        leave();
        return;
    }
    if (n_on_ <= N_FIRST) {
        return;
    }
    device_.add(n_rows, ns);
    if (!device_.full()) {
        return;
    }
    trial_ = 0;
    if (device_.median() < host_.median()) {
        cheaper_from_ = std::min(cheaper_from_, n_rows);
    } else {
        dearer_to_ = std::max(dearer_to_, n_rows);
        on_ = false;
    }
}

} // namespace plb
