/* Included before ggml's AMX kernels (cmake/AmxConfig.cmake): what a compiler and b11549 itself get
 * wrong there. On a CPU with AMX, tests/properties/test_invariance_engine.py's quantised weights tell. */
#if defined(__AMX_INT8__)
#include <ggml.h>
#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
/* GCC's <amxtileintrin.h> does not tell the optimiser what the instructions read: `ldtilecfg` 8 of
 * its 64 bytes, `tileloadd` nothing. GCC 12 at -O2 and above drops stores before them. */
#undef _tile_loadconfig
#define _tile_loadconfig(config) \
    __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#undef _tile_loadd
#define _tile_loadd(tile, base, stride) PLB_TILE_LOADD(tile, base, stride) /* expands TMM0 */
#define PLB_TILE_LOADD(tile, base, stride)                 \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile    \
                     : : "r"((const void *)(base)), "r"((long)(stride)) : "memory")
#endif

#if defined(PLB_AMX_BATCHES)
/* A product of several matrices, as the sequences of a recurrent layer are: ggml's kernels take
 * weights for each of them, though they share theirs, and count the offset of the result, which is
 * in bytes, in floats. So every sequence but the first is wrong, and memory that is not theirs is
 * read and written. Here is what their calls `ggml_batch_offset(TENSOR, batch, ne2)` should give;
 * the pasted names tell the three tensors apart, and leave the function's own definition alone. */
static inline int64_t plb_batch_bytes(const ggml_tensor * tensor, int64_t batch, int64_t ne2) {
    const int64_t i2 = tensor->ne[2] > 1 ? batch % ne2 : 0, i3 = tensor->ne[3] > 1 ? batch / ne2 : 0;
    return i3 * (int64_t) tensor->nb[3] + i2 * (int64_t) tensor->nb[2];
}
static inline int64_t plb_batch_floats(const ggml_tensor * tensor, int64_t batch, int64_t ne2) {
    return plb_batch_bytes(tensor, batch, ne2) / (int64_t) sizeof(float);
}
#define ggml_batch_offset(tensor, batch, ne2) PLB_BATCH_##tensor, batch, ne2)
#define PLB_BATCH_src0  plb_batch_bytes(src0
#define PLB_BATCH_src1  plb_batch_bytes(src1
#define PLB_BATCH_dst   plb_batch_floats(dst
#define PLB_BATCH_const ggml_batch_offset_of(const
#endif
#endif
