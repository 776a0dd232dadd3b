// operator new of a test program, libllama's included where its symbols are shared: counted, and one
// allocation may fail. For the one source file of the program.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__GNUC__)
#define NOINLINE __attribute__((noinline)) // inlined, malloc behind new draws a warning
#else
#define NOINLINE
#endif

inline std::atomic<long> n_allocations{0}; // of all threads

// Of this thread.
inline thread_local long allocations_to_failure = 0; // this one from now on fails; 0: none
inline thread_local bool allocation_failed = false;

NOINLINE void * operator new(size_t size) {
    ++n_allocations;
    if (allocations_to_failure > 0 && --allocations_to_failure == 0) {
        allocation_failed = true;
        if (const std::new_handler handler = std::get_new_handler()) {
            handler();
        }
        throw std::bad_alloc();
    }
    if (void * p = malloc(size ? size : 1)) {
        return p;
    }
    throw std::bad_alloc();
}
NOINLINE void operator delete(void * p) noexcept { free(p); }
NOINLINE void operator delete(void * p, size_t) noexcept { free(p); }
