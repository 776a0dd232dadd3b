"""What regimes.py says of the kernels, against the text of the llama.cpp that is being built."""

import re
from pathlib import Path

import pytest

from pyllamabatch.cost import apple
from pyllamabatch.cost import kernels as regimes
from pyllamabatch.cost.kernels import Kernels, Regime, kernels, rows_to_measure

GGML = Path(__file__).parents[2] / "vendor" / "llama.cpp" / "ggml" / "src"


def text(name: str) -> str:
    """A source file of the unpacked llama.cpp."""
    path = GGML / name
    assert path.is_file(), f"{path} is not there: build the package first, it unpacks llama.cpp"
    return path.read_text(encoding="utf-8")


def number(name: str, pattern: str) -> int:
    """The one number that `pattern` finds in a source file."""
    found = re.findall(pattern, text(name))
    assert len(found) == 1, f"{name}: {pattern} is there {len(found)} times; read the file again"
    return int(found[0])


def function(name: str, head: str) -> str:
    """The body of a function in a source file."""
    source = text(name)
    assert source.count(head) == 1, f"{name}: {head} has changed; read the file again"
    start = source.index(head)
    return source[start : source.index("\n}\n", start)]


def test_amx() -> None:
    """Tiles of AMX, and the types that have them."""
    tile = number("ggml-cpu/amx/common.h", r"#define TILE_M (\d+)")
    body = function("ggml-cpu/amx/mmq.cpp", "void ggml_backend_amx_mul_mat(")
    assert "if (M == 1)" in body
    assert "constexpr int BLOCK_M = TILE_M * 2;" in body
    assert (tile, 2 * tile) == regimes.AMX_TILES
    body = function("ggml-cpu/amx/common.h", "inline bool qtype_has_amx_kernels(")
    assert set(re.findall(r"GGML_TYPE_(\w+)", body)) == set(regimes.AMX_TYPES)

    has = "AVX2 AVX512 AMX_INT8"
    assert kernels("CPU", "Q4_K", features=has).tiles == (16, 32)
    assert [r.first for r in kernels("CPU", "Q4_K", features=has).regimes] == [1, 2]
    assert kernels("CPU", "Q5_0", features=has).tiles == ()
    mixed = kernels("CPU", "Q5_0", features=has, others=("Q6_K", "Q5_0"))
    assert mixed.tiles == (16, 32)
    assert mixed.regimes[-1].rest == "each"
    assert kernels("CPU", "Q4_K", features="AVX2", others=("Q6_K",)).tiles == ()
    assert {16, 17, 32, 33} <= set(mixed.edges(64))


COMMON = "ggml-metal/ggml-metal-common.cpp"


def test_metal_rows_min() -> None:
    body = function(COMMON, "ggml_metal_mul_mv_mma_rows_min(enum ggml_type type) {")
    found: dict[str, int] = {}
    for cases, value in re.findall(r"((?:case GGML_TYPE_\w+:\s*)+)return (\d+);", body):
        found |= dict.fromkeys(re.findall(r"GGML_TYPE_(\w+)", cases), int(value))
    assert found == regimes.METAL_ROWS_MIN
    assert re.findall(r"default:\s*return (\d+);", body) == [str(regimes.METAL_ROWS_MIN_ELSE)]


def test_metal_tiles() -> None:
    assert number(COMMON, r"GGML_METAL_MMA_ROWS_MAX = (\d+);") == regimes.METAL_MMA_ROWS_MAX
    assert number(COMMON, r"GGML_METAL_MMA_TILE_ROWS = (\d+);") == regimes.METAL_MMA_TILE
    product = function(
        "ggml-metal/ggml-metal-device.cpp", "_get_pipeline_mul_mm(ggml_metal_library_t"
    )
    assert re.findall(r"res\.nr1 = (\d+);", product) == [str(regimes.METAL_MM_TILE)]
    parts = re.findall(r"NRB = (\w+) \* (\w+) \* (\w+);", product)[0]
    sizes = [number("ggml-metal/ggml-metal-impl.h", rf"#define {name} +(\d+)") for name in parts]
    assert sizes[0] * sizes[1] * sizes[2] == regimes.METAL_MM_TILE_TENSOR
    chips = set(re.findall(r'containsString:@"([MA]\d+)"', text("ggml-metal/ggml-metal-device.m")))
    assert set(apple.WITH_TENSOR_UNITS) <= chips
    dense = function(COMMON, "bool ggml_metal_op_mul_mat_use_mm(")
    assert "ne00 >= 64 && ne11 > 8" in dense
    experts = function(COMMON, "bool ggml_metal_op_mul_mat_id_use_mm(")
    assert re.findall(r"ne21 >= (\d+)", experts) == [str(regimes.METAL_MOE_MM_MIN)]
    vector = function("ggml-metal/ggml-metal-ops.cpp", "bool ggml_metal_op_flash_attn_ext_use_vec(")
    assert re.findall(r"ne01 < (\d+)", vector) == [str(regimes.METAL_ATTENTION_TILED)]


def test_cuda_limits() -> None:
    limit = r"MAX_BATCH_SIZE (\d+) // Max"
    assert number("ggml-cuda/mmvq.cuh", "MMVQ_" + limit) == regimes.CUDA_VEC_MAX
    assert number("ggml-cuda/mmvf.cuh", "MMVF_" + limit) == regimes.CUDA_VEC_MAX
    floats = r"src1_ncols > (\d+)\) \{\s*return false;\s*\}\s*\}\s*switch"
    assert number("ggml-cuda/mmf.cu", floats) == regimes.CUDA_MMF_MAX
    first, last, step = re.findall(r"for \(int J = (\d+); J <= (\d+).*?J \+= (\d+)\)",
                                   text("ggml-cuda/mmq.cu"))[0]  # fmt: skip
    assert (int(first), int(step)) == (regimes.CUDA_TILE, regimes.CUDA_TILE)
    assert int(last) == regimes.CUDA_TILE_MAX


def test_cpu_groups() -> None:
    source = text("ggml-cpu/repack.cpp")
    assert f"nrows % {regimes.CPU_ROWS}" in source
    assert f"if (nrows > {regimes.CPU_ROWS - 1})" in source
    x86 = text("ggml-cpu/arch/x86/repack.cpp")
    assert f"int anr = nr - nr % {regimes.CPU_GROUP};" in x86
    body = source[source.index("ggml_repack_get_optimal_repack_type(") :]
    for kind in ("Q4_0", "IQ4_NL", "MXFP4"):
        part = body[body.index(f"cur->type == GGML_TYPE_{kind})") :]
        assert "ggml_cpu_has_avx2()" in part[: part.index("else if")]
    part = body[body.index("cur->type == GGML_TYPE_Q4_K)") :]
    assert "ggml_cpu_has_avx2()" not in part[: part.index("else if")]
    assert number("ggml-cpu/common.h", r"GGML_FA_TILE_Q\s*=? *(\d+)") == regimes.CPU_ATTENTION_TILED


def test_cpu_few_rows_of_k_quants() -> None:
    few = re.findall(r"#define TILED_FEW +(\d+)", text("ggml-cpu/tiled/tiled.cpp"))
    assert few == [str(regimes.CPU_K_FEW), str(regimes.CPU_K_FEW_AVX2)]
    body = function("ggml-cpu/tiled/tiled.cpp", "static bool ggml_tiled_few(")
    assert tuple(re.findall(r"GGML_TYPE_(\w+)", body)) == regimes.CPU_K_TYPES
    tile = number("ggml-cpu/tiled/tiled-kernel.h", r"#define TILED_MICRO +(\d+)")
    assert tile == regimes.CPU_TILE
    vnni = kernels("CPU", "Q4_K", features="AVX2 AVX512 AVX512_VNNI")
    assert [r.first for r in vnni.regimes] == [1, 2, 17]
    assert [r.first for r in kernels("CPU", "Q6_K", features="AVX2").regimes] == [1, 2, 33]
    assert kernels("CPU", "Q4_K", features="NEON DOTPROD").regimes[-1].rest == "each"


def test_cpu_rows_of_other_k_quants() -> None:
    source = "ggml-cpu/tiled/tiled.cpp"
    first = number(source, r"return rows >= (\d+) \|\| ggml_tiled_matmul_forced")
    body = text(source)[text(source).index("// Supported quant types for src0") :]
    types = re.findall(r"case GGML_TYPE_(\w+):", body[: body.index("return true;")])
    assert {"Q3_K", "IQ4_XS", "IQ3_S", "IQ2_XXS", "IQ1_M"} < set(types)
    assert all(kind.startswith(regimes.CPU_TILED_TYPES) for kind in types)
    for kind in set(types) - {*regimes.CPU_K_TYPES}:
        found = kernels("CPU", kind, features="AVX AVX2").regimes
        assert [(r.first, r.tile) for r in found] == [(1, 1), (2, 1), (first, regimes.CPU_TILE)]
    # repacked there, and not in tiles at all
    assert kernels("CPU", "Q2_K", features="AVX AVX2 AVX512").regimes[-1].rest == "each"
    assert kernels("CPU", "IQ4_NL", features="AVX").regimes[-1].rest == "each"


def test_two_rows_are_a_tile_of_tinyblas_and_three_are_not() -> None:
    source = text("ggml-cpu/llamafile/sgemm.cpp")
    body = source[source.index("class tinyBLAS_Q0_AVX {") :]
    few = body[body.index("#else\n        case 0x44:") :]
    assert (
        "case 0x43:\n        case 0x42:\n            mc = 4;\n            nc = 2;"
        in few[: few.index("break;")]
    )
    assert [r.first for r in kernels("CPU", "Q5_0", features="AVX2").regimes] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("kind", "firsts"),
    [
        ("Q4_0", [1, 2, 17]),
        ("Q4_K", [1, 2, 3, 17]),
        ("F16", [1, 2, 3, 17]),
        ("BF16", [1, 2, 4, 17]),
        ("F32", [1, 2, 6, 17]),
    ],
)
def test_metal_regimes(kind: str, firsts: list[int]) -> None:
    assert [r.first for r in kernels("MTL", kind).regimes] == firsts
    moe = kernels("Metal", kind, moe=True)
    assert [r.first for r in moe.regimes] == [*firsts, 32]


def test_metal_tensor_units() -> None:
    """Few-row kernels are the same; beyond 16 rows a tile has four times as many."""
    m4, m5 = (kernels("MTL", "Q4_0", device=f"Apple {chip}") for chip in ("M4 Max", "M5 Pro"))
    assert m4.regimes[:-1] == m5.regimes[:-1]
    assert {8, 9, 16, 17, 32, 33} <= set(m4.edges(64))
    assert {8, 9, 16, 17, 64} <= set(m5.edges(64))
    assert not {32, 33} & set(m5.edges(64))


def test_regime_of_rows() -> None:
    found = kernels("CUDA", "Q4_K")
    assert [found.of(n) for n in (1, 2, 8, 9, 128, 129, 5000)] == [0, 1, 1, 2, 2, 3, 3]
    assert {1, 2, 8, 9, 16, 17, 64} <= set(found.edges(64))
    assert kernels("CPU", "Q4_0", features="AVX2").regimes[-1].rest == "each"
    assert "gemm" in kernels("CPU", "Q4_0", features="AVX2").regimes[-1].kernel
    assert "tinyBLAS" in kernels("CPU", "Q5_0", features="AVX2").regimes[-1].kernel
    assert kernels("Vulkan", "Q4_K") == Kernels((Regime(1),))


def test_rows_to_measure() -> None:
    rows = list(rows_to_measure(kernels("MTL", "Q4_0")))
    assert rows == sorted(set(rows))
    assert {*range(1, 13), 16, 17, 32, 33, 64} <= set(rows)
    assert rows[-1] == 64
    assert list(rows_to_measure(kernels("MTL", "Q4_0"), 3)) == [1, 2, 3]
