/* Included before ggml's AMX kernels (cmake/AmxConfig.cmake). GCC's <amxtileintrin.h> tells the
 * optimiser that `ldtilecfg` reads 8 bytes, not 64: GCC 12 at -O2 and above drops the stores to the
 * rest of the configuration, and the instruction faults, or the tiles are not there. */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) \
    __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#endif
