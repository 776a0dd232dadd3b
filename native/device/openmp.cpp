// OpenMP's helpers of a thread. ggml's CPU backend computes in OpenMP regions, and GCC's library keeps
// a pool of helpers for every thread that ever entered one. When all pools together are more than
// the cores, waiting at a barrier is no longer spinning but sleeping, some hundred times in a step.
#include "plb.h"

#if defined(__linux__)
extern "C" int omp_pause_resource_all(int kind) __attribute__((weak));
#endif

void plb_threads_release(void) {
#if defined(__linux__)
    constexpr int soft = 1;  // omp_pause_soft
    if (omp_pause_resource_all) {
        omp_pause_resource_all(soft);
    }
#endif
}
