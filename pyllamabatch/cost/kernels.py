"""What the kernels of the pinned llama.cpp (b11549) do with n rows, by backend and weight type.

A regime is a range of row counts that one kernel serves. Within it rows come in tiles: a tile that
is not full costs like a full one. The table tells calibration where to measure and the cost model
where its steps are; what a step costs is measured. Files are those of `ggml/src` in llama.cpp.

Metal (ggml-metal/ggml-metal-common.cpp: `ggml_metal_mul_mv_mma_rows_min`, `..._MMA_ROWS_MAX`,
`..._MMA_TILE_ROWS`, `ggml_metal_op_mul_mat_use_mm`, `ggml_metal_op_mul_mat_id_use_mm`;
ggml-metal-impl.h and ggml-metal-device.cpp: the tile of `mul_mm`): a mat-vec kernel for one row,
small-batch mat-vec below `rows_min`, few-row matrix kernels in tiles of 8 up to 16 rows, then
`mul_mm`, whose tile has 32 rows, or 128 with tensor units: 17 rows cost as much as 32, or 128.
Expert products are mat-vec per row up to 31 rows, `mul_mm_id` from 32 on.

CUDA (ggml-cuda/mmvq.cuh: `MMVQ_MAX_BATCH_SIZE`; mmvf.cuh; mmf.cu; mmq.cu, the loop over J): quants
are mat-vec (one template per row count) up to 8 rows, then `mmq`, whose tile is the smallest
multiple of 8 (of 16 above 48) that holds the rows, at most 128. F16, BF16 and F32 are mat-vec up
to 1 to 8 rows (mmvf.cu), tensor-core `mmf` up to 16, then cuBLAS. Some chips leave mat-vec earlier
(mmvq.cu: `ggml_cuda_should_use_mmvq`; K-quants of an RTX 5090 above 5 to 7 rows).

CPU (ggml-cpu/repack.cpp: `forward_mul_mat_one_chunk`, `ggml_repack_get_optimal_repack_type`;
arch/x86/repack.cpp; llamafile/sgemm.cpp): repacked weights go row by row below four rows, then
sixteen at a time, then four, and each of the rest alone, so seven rows cost more than eight. Of the
others, those of blocks of 32 (Q4_0, Q4_1, Q5_0, Q8_0, IQ4_NL) go in tinyBLAS's tiles, four rows
wide (two with AVX2 only) and one narrower (vendor/patches/cpu-few-columns.patch: all in one pass
over the weights), the floats from two rows on in its tiles of up to 6. With AVX2
Q4_K, Q5_K and Q6_K unpack a block once for all rows, up to `TILED_FEW`, then come tiles of 16
(tiled/tiled.cpp; vendor/patches/cpu-k-quants.patch); other K-quants and most IQ types go row by row
up to seven, then in the same tiles (`ggml_tiled_supported`, `ggml_tiled_min_batch`): of IQ4_XS a
tile of sixteen takes less than six rows. Where the CPU has AMX
(amx/amx.cpp: `qtype_has_amx_kernels`; amx/mmq.cpp: `ggml_backend_amx_mul_mat`, `TILE_M`), most
quants have neither: a single row goes through a kernel of its own, and from two on each block of 32
rows unpacks the weights again and computes them in tiles of 16. A file mixes types (Q4_K_M has Q5_0
where rows are not a multiple of 256 long), so blocks and tiles come on top of what the type of most
bytes has: the cost model takes that for tiles of four in groups of sixteen."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pyllamabatch.cost.apple import has_tensor_units

METAL_ROWS_MIN = {"F32": 6, "TQ2_0": 5, "BF16": 4} | dict.fromkeys(
    ("F16", "Q2_0", "Q4_K", "Q5_0", "Q5_1", "Q2_K", "IQ4_NL", "MXFP4"), 3
)
METAL_ROWS_MIN_ELSE = 2
METAL_MMA_ROWS_MAX = 16
METAL_MMA_TILE = 8
METAL_MM_TILE, METAL_MM_TILE_TENSOR = 32, 128  # the second on chips with tensor units
METAL_MOE_MM_MIN = 32
METAL_ATTENTION_TILED = 20  # ggml-metal-ops.cpp: `ggml_metal_op_flash_attn_ext_use_vec`
CUDA_VEC_MAX = 8
CUDA_MMF_MAX = 16
CUDA_TILE = 8
CUDA_TILE_MAX = 128
CPU_ROWS = 4
CPU_GROUP = 16
CPU_ATTENTION_TILED = 64  # ggml-cpu/common.h: GGML_FA_TILE_Q
CPU_K_TYPES = ("Q4_K", "Q5_K", "Q6_K")
CPU_K_FEW, CPU_K_FEW_AVX2 = 16, 32  # the second without AVX512_VNNI
CPU_TILE = 16
CPU_TILED_FROM = 8
CPU_TILED_TYPES = ("Q2_K", "Q3_K", *CPU_K_TYPES, "IQ4_XS", "IQ3", "IQ2", "IQ1")  # prefixes
ROW_BY_ROW = "vec_dot"  # a kernel for which each row costs as much as the first one
AMX_TILES = (16, 32)
AMX_TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


@dataclass(frozen=True, slots=True)
class Regime:
    """Row counts from `first` on. `tile`: rows that are computed at once; `rest`: rows beyond the
    last full tile cost one more tile ("tile"), or for each number of them something else ("each"),
    which may be more than a tile. `group`: so many rows at once are cheaper than their tiles."""

    first: int
    tile: int = 1
    rest: str = "tile"
    kernel: str = ""
    group: int = 0


@dataclass(frozen=True, slots=True)
class Kernels:
    """The regimes of one backend for one kind of weights, in order of `first`, the first from one
    row. `attention_from`: rows from which attention has a kernel of its own for many rows. `tiles`:
    rows that another kernel computes at once, from two on, which other weights of a file have.
    `computes_masked`: attention computes all cells up to the last one that is held, those too that
    are free or masked for its rows; other kernels leave blocks of them out (Metal: fa_aux.metal,
    `kernel_flash_attn_ext_blk`; CPU: ops.cpp, where the mask is -INFINITY)."""

    regimes: tuple[Regime, ...]
    attention_from: int = 2**31
    tiles: tuple[int, ...] = ()
    computes_masked: bool = False

    def of(self, n: int) -> int:
        """Index of the regime that n rows fall into."""
        return sum(regime.first <= n for regime in self.regimes) - 1

    def edges(self, limit: int) -> tuple[int, ...]:
        """Row counts where the cost may jump: the last row before, and the first row of, every
        regime, tile and kernel of attention, up to `limit`."""
        ends = [*(regime.first for regime in self.regimes[1:]), limit + 1]
        spans = [(r.first, end, r.tile) for r, end in zip(self.regimes, ends, strict=True)]
        spans += [(tile, limit + 1, tile) for tile in self.tiles]
        found = {self.attention_from - 1, self.attention_from}
        for first, end, tile in spans:
            found |= {first, end - 1}
            if tile > 1:
                full = range(-(-first // tile) * tile, end, tile)
                found |= {*full, *(n + 1 for n in full)}
        return tuple(sorted(n for n in found if 1 <= n <= limit))

    def last_rows(self, limit: int) -> tuple[int, ...]:
        """The row counts of `edges` that end a tile or a kernel's range: one row more may cost a
        jump. `limit` is among them."""
        edges = self.edges(limit)
        return tuple(n for n in edges if n + 1 in edges or n == limit)


def kernels(
    backend: str,
    weight_type: str,
    *,
    moe: bool = False,
    features: str = "",
    others: Collection[str] = (),
    device: str = "",
) -> Kernels:
    """What is known of a backend ("Metal" or "MTL", "CUDA", "CPU", ...) for weights that are mostly
    of this type ("Q4_K", "F16", ...); of an unknown one a regime without steps. `features`: the
    CPU's instruction sets ("AVX2 AVX512", ...). `others`: types that a good part of the weights
    have. `device`: its description, which tells Apple's chips apart."""
    kind = backend.upper()
    if kind.startswith(("MTL", "METAL")):
        return _metal(weight_type, moe, has_tensor_units(device))
    if is_cuda(backend):
        return _cuda(weight_type)
    if kind.startswith("CPU"):
        return _cpu(weight_type, features, others)
    return Kernels((Regime(1),))


def is_cuda(backend: str) -> bool:
    """Whether these are the CUDA backend's sources, whatever they are compiled for."""
    return backend.upper().startswith(("CUDA", "ROCM", "MUSA"))


def _metal(weight_type: str, moe: bool, tensor: bool) -> Kernels:
    low = METAL_ROWS_MIN.get(weight_type, METAL_ROWS_MIN_ELSE)
    tile = METAL_MM_TILE_TENSOR if tensor else METAL_MM_TILE
    found = [
        Regime(1, kernel="mul_mv"),
        *([Regime(2, kernel="mul_mv_ext")] if low > 2 else []),
        Regime(low, METAL_MMA_TILE, kernel="mul_mv_mma"),
        Regime(METAL_MMA_ROWS_MAX + 1, tile, kernel="mul_mm"),
        *([Regime(METAL_MOE_MM_MIN, tile, kernel="mul_mm, mul_mm_id")] if moe else []),
    ]
    return Kernels(tuple(found), METAL_ATTENTION_TILED)


def _cuda(weight_type: str) -> Kernels:
    if weight_type in ("F16", "BF16", "F32"):
        found = [Regime(1, kernel="mmvf"), Regime(2, kernel="mmvf, mmf"),
                 Regime(CUDA_MMF_MAX + 1, kernel="cuBLAS")]  # fmt: skip
        return Kernels(tuple(found), CUDA_VEC_MAX + 1, computes_masked=True)
    found = [
        Regime(1, kernel="mmvq"),
        Regime(2, kernel="mmvq"),
        Regime(CUDA_VEC_MAX + 1, CUDA_TILE, kernel="mmq"),
        Regime(CUDA_TILE_MAX + 1, CUDA_TILE_MAX, kernel="mmq"),
    ]
    return Kernels(tuple(found), CUDA_VEC_MAX + 1, computes_masked=True)


_REPACKED = {
    "AVX2": ("Q4_0", "IQ4_NL", "MXFP4"),
    "AVX512": ("Q2_K",),
    "DOTPROD": ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4", "Q8_0"),
}


def _cpu(weight_type: str, features: str, others: Collection[str]) -> Kernels:
    has = set(features.upper().split())
    amx = {weight_type, *others}.intersection(AMX_TYPES) if "AMX_INT8" in has else set()
    tiles = AMX_TILES if amx else ()
    if weight_type in amx:
        found = [Regime(1, kernel="AMX: avx512-vnni"), Regime(2, kernel="AMX")]
        return Kernels(tuple(found), CPU_ATTENTION_TILED, tiles)
    if weight_type in CPU_K_TYPES and "AVX2" in has:
        last = CPU_K_FEW if "AVX512_VNNI" in has else CPU_K_FEW_AVX2
        found = [Regime(1, kernel="few columns"), Regime(2, kernel="few columns"),
                 Regime(last + 1, CPU_TILE, kernel="tiled")]  # fmt: skip
        return Kernels(tuple(found), CPU_ATTENTION_TILED, tiles)
    if any(weight_type in types for name, types in _REPACKED.items() if name in has):
        few, many = "gemv", "gemm of 16 and 4, gemv"
    elif weight_type.startswith(CPU_TILED_TYPES) and "AVX" in has:
        found = [Regime(1, kernel=ROW_BY_ROW), Regime(2, kernel=ROW_BY_ROW),
                 Regime(CPU_TILED_FROM, CPU_TILE, kernel="tiled")]  # fmt: skip
        return Kernels(tuple(found), CPU_ATTENTION_TILED, tiles)
    else:
        few = many = "tinyBLAS in tiles of 4 and less, or vec_dot"
    found = [Regime(1, kernel="gemv or vec_dot"), Regime(2, kernel=few), Regime(3, kernel=few),
             Regime(CPU_ROWS, CPU_ROWS, "each", many, CPU_GROUP)]  # fmt: skip
    return Kernels(tuple(found), CPU_ATTENTION_TILED, tiles)


def rows_to_measure(found: Kernels, limit: int = 64) -> Sequence[int]:
    """Row counts for calibration, up to `limit`: every one to 12, the edges, then steps of a
    quarter."""
    quarters = (16, 20, 24, 28, 32, 40, 48, 60)
    wanted = {*range(1, 13), *quarters, limit, *(n for n in found.edges(limit) if n <= 40)}
    return sorted(n for n in wanted if n <= limit)
