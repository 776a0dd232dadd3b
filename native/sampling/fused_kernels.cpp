// The kernels, compiled once per instruction set, and the choice among them.
#include "sampling/fused_kernels.hpp"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__) && defined(__GNUC__)
#define PLB_X86 1
#ifndef __clang__ // gcc 12 takes the intrinsics' own "undefined" vectors for a mistake of ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Minimax polynomial: 2^f on |f| <= 1/2, relative error 7.5e-8.
#define PLB_EXP_F0 1.0000001192092896f
#define PLB_EXP_F1 0.6931469440460205f
#define PLB_EXP_F2 0.24022117257118225f
#define PLB_EXP_F3 0.05550714582204819f
#define PLB_EXP_F4 0.009675655514001846f
#define PLB_EXP_F5 0.0013276358367875218f

namespace plb {

#define PLB_SIMD 0
#define PLB_SIMD_NAME "base"
namespace simd_base {
#include "sampling/fused_kernels.inc"
}
#undef PLB_SIMD
#undef PLB_SIMD_NAME

#ifdef PLB_X86

#if defined(__clang__)
#define PLB_TARGET_AVX2 \
    _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to=function)")
#define PLB_TARGET_AVX512 \
    _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,avx512f,avx512dq,avx512bw,avx512vl\"))), apply_to=function)")
#define PLB_TARGET_END _Pragma("clang attribute pop")
#else
#define PLB_TARGET_AVX2 \
    _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define PLB_TARGET_AVX512 \
    _Pragma("GCC push_options") \
    _Pragma("GCC target(\"avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512\")")
#define PLB_TARGET_END _Pragma("GCC pop_options")
#endif

PLB_TARGET_AVX2
#define PLB_SIMD 2
#define PLB_SIMD_NAME "avx2"
namespace simd_avx2 {
#include "sampling/fused_kernels.inc"
}
#undef PLB_SIMD
#undef PLB_SIMD_NAME
PLB_TARGET_END

PLB_TARGET_AVX512
#define PLB_SIMD 5
#define PLB_SIMD_NAME "avx512"
namespace simd_avx512 {
#include "sampling/fused_kernels.inc"
}
#undef PLB_SIMD
#undef PLB_SIMD_NAME
PLB_TARGET_END

#endif // PLB_X86

const kernels * kernels_named(const char * name) {
    if (strcmp(name, "base") == 0) {
        return &simd_base::set;
    }
#ifdef PLB_X86
    __builtin_cpu_init();
    if (strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") &&
        __builtin_cpu_supports("fma")) {
        return &simd_avx2::set;
    }
    if (strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
        return &simd_avx512::set;
    }
#endif
    return nullptr;
}

static const kernels & choose() {
    const char * asked = getenv("PLB_SIMD");
    const kernels * named = asked == nullptr ? nullptr : kernels_named(asked);
    if (named != nullptr) {
        return *named;
    }
    for (const char * name : {"avx512", "avx2"}) {
        if (const kernels * found = kernels_named(name)) {
            return *found;
        }
    }
    return simd_base::set;
}

const kernels & best_kernels() {
    static const kernels & best = choose();
    return best;
}

} // namespace plb
