// Where candidates are chosen: what is measured decides, and a change is not made too often.
#include "check.hpp"
#include "device/placement.hpp"
#include "plb.h"

using plb::placement;

namespace {

// A device that costs 1000 a step, and a host that costs 100 a row.
bool step(placement & place, int32_t n_rows, bool able = true) {
    const bool on_device = place.on_device(n_rows, able);
    place.took(n_rows, on_device, on_device ? 1000 : 100 * n_rows);
    return on_device;
}

int steps(placement & place, int32_t n_rows, int n, bool able = true) {
    int n_on_device = 0;
    for (int i = 0; i < n; ++i) {
        n_on_device += step(place, n_rows, able);
    }
    return n_on_device;
}

void what_is_cheaper_stays() {
    placement place(PLB_DEVICE_SAMPLING_AUTO);
    CHECK(steps(place, 64, 8) == 0); // the host is timed first
    CHECK(steps(place, 64, 100) == 100);
    CHECK(place.cheaper_from() == 64);
    CHECK(steps(place, 80, 10) == 10); // what pays for fewer rows pays for more
}

void what_is_dearer_is_tried_once() {
    placement place(PLB_DEVICE_SAMPLING_AUTO);
    const int tried = steps(place, 4, 1000);
    CHECK(tried > 8 && tried < 20);
    CHECK(steps(place, 4, 1000) == 0);
    CHECK(steps(place, 2, 1000) == 0); // nor for fewer rows
    CHECK(steps(place, 32, 1000) > 900);
    CHECK(steps(place, 4, 1000) < 50); // the batch has become small: back after a while
    CHECK(steps(place, 32, 1000) > 900);
}

void a_step_that_cannot_is_the_hosts() {
    placement place(PLB_DEVICE_SAMPLING_AUTO);
    steps(place, 64, 100);
    CHECK(!step(place, 64, false));
    int changes = 0;
    bool before = false;
    for (int i = 0; i < 10000; ++i) { // a stream of steps of which each 40th can't
        const bool now = step(place, 64, i % 40 != 0);
        changes += now != before;
        before = now;
    }
    CHECK(changes < 20);
    CHECK(steps(place, 64, 5000) > 2000); // and on it goes when they have ended
}

void a_batch_that_changes_is_not_judged() {
    placement place(PLB_DEVICE_SAMPLING_AUTO);
    for (int i = 0; i < 1000; ++i) {
        step(place, 10 + i % 2);
    }
    CHECK(place.cheaper_from() == INT32_MAX);
    for (const int often : {9, 12, 20}) { // a trial takes longer
        placement other(PLB_DEVICE_SAMPLING_AUTO);
        int changes = 0;
        bool before = false;
        for (int i = 0; i < 10000; ++i) {
            const bool now = step(other, 10 + i / often % 2);
            changes += now != before;
            before = now;
        }
        CHECK(changes < 30);
        CHECK(steps(other, 64, 5000) > 2000); // when it has come to rest
    }
}

void what_is_known_is_not_tried() {
    placement place(PLB_DEVICE_SAMPLING_AUTO, true);
    CHECK(steps(place, 1, 100) == 100);
    CHECK(steps(place, 64, 100) == 100);
    CHECK(!step(place, 64, false));
    CHECK(steps(place, 64, 100) > 70);
}

void modes() {
    placement off(PLB_DEVICE_SAMPLING_OFF), on(PLB_DEVICE_SAMPLING_ON);
    CHECK(steps(off, 64, 100) == 0);
    CHECK(steps(on, 1, 100) == 100);
    CHECK(steps(on, 1, 100, false) == 0);
    placement place(PLB_DEVICE_SAMPLING_AUTO);
    steps(place, 64, 100);
    place.refuse();
    CHECK(steps(place, 64, 1000) == 0);
}

} // namespace

int main() {
    what_is_cheaper_stays();
    what_is_dearer_is_tried_once();
    a_step_that_cannot_is_the_hosts();
    a_batch_that_changes_is_not_judged();
    what_is_known_is_not_tried();
    modes();
    return 0;
}
