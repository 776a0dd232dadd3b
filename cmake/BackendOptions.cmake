# ggml's options from ours and the platform. Each is a cache default: -DGGML_…=… still wins.
# Also run alone, with the platform variables set, by tests/packaging/test_cmake_options.py.
set(BUILD_SHARED_LIBS ON CACHE BOOL "" FORCE)

if (APPLE)
    set(GGML_METAL ON CACHE BOOL "Metal backend")
    set(GGML_METAL_EMBED_LIBRARY ON CACHE BOOL "Metal library inside the backend")
    # ggml turns it on for a Mac, and prompts of 32 rows and more then go to Accelerate where the CPU
    # computes: to as many threads as that likes, and with other sums than fewer rows have.
    set(GGML_BLAS OFF CACHE BOOL "Accelerate for many rows on the CPU")
endif()

if (PLB_PORTABLE)
    set(GGML_NATIVE OFF CACHE BOOL "" FORCE)
    set(GGML_BACKEND_DL ON CACHE BOOL "" FORCE)
    set(GGML_CPU_ALL_VARIANTS ON CACHE BOOL "" FORCE)
else()
    set(GGML_NATIVE ON CACHE BOOL "Optimise for this machine")
endif()

# ggml's own threads: with vendor/patches/cpu-threads-sleep.patch one that waits for others sleeps soon,
# where an OpenMP library spins for milliseconds, also while another process needs the core.
set(GGML_OPENMP OFF CACHE BOOL "OpenMP instead of ggml's own threads")

# Only the libraries: tools are built by the benches, in a tree of their own.
foreach(part COMMON TESTS TOOLS EXAMPLES SERVER APP UI)
    set(LLAMA_BUILD_${part} OFF CACHE BOOL "" FORCE)
endforeach()
