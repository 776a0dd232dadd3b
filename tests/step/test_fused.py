"""The fused sampler: against NumPy in double precision, and libllama's own chain by raw calls.

The long comparison with the chain, 100,000 rows, is native: see native/tests/test_fused.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import Stepper
from tests.support.decoding import generate
from tests.support.models_gguf import gguf_path

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
RESULT = np.dtype(
    [("seq", "i4"), ("row", "i4"), ("token", "i4"), ("index", "i4"), ("finish", "i4"),
     ("error", "i4"), ("n_top", "i4"), ("logprob", "f4")]
)  # fmt: skip


class Rows:
    """Rows of logits of one's own: `plb_rows` in NumPy's terms."""

    def __init__(self, n_vocab: int, n_slots: int = 1, *, n_top: int = 0, threads: int = 1) -> None:
        out = ffi.new("plb_rows **")
        assert lib.plb_rows_new(n_vocab, n_slots, n_top, threads, out) == 0
        self.ptr = ffi.gc(out[0], lib.plb_rows_free)
        self.results = np.zeros(n_slots, RESULT)
        self.top = np.zeros((n_slots, n_top), np.int32)
        self.top_logprob = np.zeros((n_slots, n_top), np.float32)

    def set(self, slot: int, *, path: int | None = None, **fields: Any) -> int:
        sampling = sampling_of(**fields)
        sampling.path = lib.PLB_PATH_FUSED if path is None else path
        return int(lib.plb_rows_set(self.ptr, slot, sampling, ffi.NULL, 0))

    def sample(self, logits: F32) -> npt.NDArray[np.void]:
        n = len(logits)
        code = lib.plb_rows_sample(
            self.ptr,
            n,
            ffi.from_buffer("float[]", logits.reshape(-1)),
            logits.shape[1],
            ffi.cast("plb_result *", self.results.ctypes.data),
            ffi.cast("llama_token *", self.top.ctypes.data) if self.top.size else ffi.NULL,
            ffi.cast("float *", self.top_logprob.ctypes.data) if self.top.size else ffi.NULL,
        )
        assert code == 0
        results: npt.NDArray[np.void] = self.results[:n]
        return results


def sampling_of(**fields: Any) -> Any:
    """A plb_sampling with every truncation off but those that are named."""
    off = {"max_tokens": 2**31 - 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    sampling = ffi.new("plb_sampling *", lib.plb_sampling_default())
    for name, value in (off | {"seed": 7} | fields).items():
        setattr(sampling, name, value)
    return sampling


class Chain:
    """llama.cpp's chain in its default order, by raw calls."""

    def __init__(self, **fields: Any) -> None:
        p = sampling_of(**fields)
        settings = lib.llama_sampler_chain_default_params()
        settings.no_perf = True
        self.ptr = ffi.gc(lib.llama_sampler_chain_init(settings), lib.llama_sampler_free)
        if p.temperature == 0:
            self._add(lib.llama_sampler_init_greedy())
            return
        if p.top_k > 0:
            self._add(lib.llama_sampler_init_top_k(p.top_k))
        self._add(lib.llama_sampler_init_top_p(p.top_p, 0))
        self._add(lib.llama_sampler_init_min_p(p.min_p, 0))
        self._add(lib.llama_sampler_init_temp_ext(p.temperature, 0, 1))
        self._add(lib.llama_sampler_init_dist(p.seed))

    def _add(self, sampler: Any) -> None:
        lib.llama_sampler_chain_add(self.ptr, sampler)

    def sample(self, logits: F32) -> tuple[int, int]:
        """The token and how many candidates it was drawn from."""
        data = np.zeros(len(logits), [("id", "i4"), ("logit", "f4"), ("p", "f4")])
        data["id"], data["logit"] = np.arange(len(logits)), logits
        array = ffi.new("llama_token_data_array *")
        array.data = ffi.cast("llama_token_data *", data.ctypes.data)
        array.size, array.selected, array.sorted = len(logits), -1, False
        lib.llama_sampler_apply(self.ptr, array)
        return int(data["id"][array.selected]), int(array.size)


def reference(
    logits: F32, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> F64:
    """Probabilities in double precision, 0 for what is cut off.  Logits without ties."""
    x = logits.astype(np.float64)
    order = np.argsort(-x)
    if top_k > 0:
        order = order[:top_k]
    p = np.exp(x[order] - x[order[0]])
    p /= p.sum()
    if top_p < 1:
        order = order[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
    if min_p > 0:
        order = order[x[order] >= x[order[0]] + np.log(min_p)]
    weights = np.exp((x[order] - x[order[0]]) / temperature)
    out = np.zeros(len(x))
    out[order] = weights / weights.sum()
    return out


def rows_of(shape: str, n_rows: int, n_vocab: int, seed: int) -> F32:
    random = np.random.default_rng(seed)
    x = random.standard_normal((n_rows, n_vocab), np.float32) * np.float32(3)
    if shape == "peaked":
        x[:, random.integers(0, n_vocab, 12)] += np.float32(14)
    elif shape == "ties":
        x = np.round(x * 4) / np.float32(4)
    elif shape == "flat":
        x *= np.float32(1e-3)
    elif shape == "excluded":
        x[random.random(x.shape) < 0.9] = -np.inf
        x[:, 5] = 1
    return np.ascontiguousarray(x, np.float32)


SHAPES = ["normal", "peaked", "ties", "flat", "excluded"]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"top_k": 500, "top_p": 0.9},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"temperature": 0.7, "min_p": 0.02},
    {"temperature": 0.8},
]


@pytest.mark.parametrize("n_vocab", [257, 32000, 151936, 262144])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokens_of_the_chain(shape: str, n_vocab: int) -> None:
    n_rows = 40 if n_vocab < 100_000 else 6
    logits = rows_of(shape, n_rows, n_vocab, n_vocab)
    before = logits.copy()
    for setting in SETTINGS:
        fused, chain = Rows(n_vocab), Chain(**setting)
        assert fused.set(0, **setting) == 0
        sorted_ = "top_k" in setting or "top_p" in setting
        same = []
        for row in logits:
            expected, size = chain.sample(row)
            result = fused.sample(row[None])[0]
            assert result["error"] == 0
            token = result["token"]
            # a nucleus beyond 1,024 has an order of its own: test_frequencies
            if size <= 1024 or "top_p" not in setting:
                # among equal logits the ids decide, not the chain's unstable sort
                same.append(row[token] == row[expected] if sorted_ else token == expected)
        if "top_p" in setting and "top_k" not in setting:
            # where the chain's float sum comes to top_p, its rounding may decide on one candidate
            assert sum(same) >= 0.75 * len(same), setting
        else:
            assert all(same), setting
            assert len(same) == n_rows
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 300},
        {"top_p": 0.6},
        {"temperature": 1.5, "top_p": 0.95},
        {"temperature": 0.8, "top_p": 0.99, "min_p": 0.001},
        {"temperature": 1.2, "min_p": 0.01},
        {"temperature": 1.0},
    ],
)
def test_frequencies(setting: dict[str, Any]) -> None:
    """Chi-square over 60 groups of tokens against double precision, 40,000 draws."""
    n_vocab, n_slots, rounds = 4000, 50, 800
    logits = np.random.default_rng(3).standard_normal(n_vocab, np.float32) * np.float32(1.3)
    p = reference(logits, **setting)
    rows = Rows(n_vocab, n_slots, threads=2)
    for slot in range(n_slots):
        assert rows.set(slot, **setting, seed=slot) == 0
    same = np.repeat(logits[None], n_slots, 0)
    seen = np.zeros(n_vocab)
    for _ in range(rounds):
        np.add.at(seen, rows.sample(same)["token"], 1)
    # a candidate at the edge of the nucleus may be in by the chain's float sum alone
    assert seen[p == 0].sum() <= 1e-3 * seen.sum()
    groups = np.argsort(np.random.default_rng(4).random(n_vocab)) % 60
    expected = np.bincount(groups, p, 60) * seen.sum()
    counted = np.bincount(groups, seen, 60)
    large = expected >= 5
    chi_square = float((((counted - expected) ** 2)[large] / expected[large]).sum())
    assert chi_square < 120  # at most 59 degrees of freedom: exceeded once in 100,000


def test_one_seed_one_text() -> None:
    logits = rows_of("normal", 30, 20000, 1)
    texts = []
    for seed in (1, 1, 2):
        rows = Rows(20000)
        rows.set(0, top_p=0.95, seed=seed)
        texts.append([int(rows.sample(row[None])["token"][0]) for row in logits])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("threads", [2, 7, 16])
def test_threads_change_nothing(threads: int) -> None:
    n_vocab, n_rows = 40000, 6
    settings = SETTINGS[1:]
    one, many = Rows(n_vocab, n_rows), Rows(n_vocab, n_rows, threads=threads)
    assert lib.plb_rows_threads(many.ptr) == threads
    for slot, setting in enumerate(settings):
        assert one.set(slot, **setting) == many.set(slot, **setting) == 0
    for seed in range(6):
        logits = rows_of(SHAPES[seed % 5], n_rows, n_vocab, seed)
        for n in (n_rows, 2, 1):
            expected = one.sample(logits[:n])["token"].tolist()
            assert many.sample(logits[:n])["token"].tolist() == expected


@pytest.mark.parametrize("shape", ["normal", "peaked", "excluded"])
def test_log_probabilities(shape: str) -> None:
    n_vocab = 33000
    logits = rows_of(shape, 4, n_vocab, 9)
    rows = Rows(n_vocab, 4, n_top=8)
    for slot in range(4):
        rows.set(slot, n_logprobs=8, top_k=3 + slot)
    result = rows.sample(logits)
    for i, row in enumerate(logits.astype(np.float64)):
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert result["logprob"][i] == pytest.approx(expected[result["token"][i]], abs=1e-5)
        assert result["n_top"][i] == 8
        best = np.argsort(-expected, kind="stable")[:8]
        assert rows.top[i].tolist() == best.tolist()
        np.testing.assert_allclose(rows.top_logprob[i], expected[best], atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_bad_logits(setting: dict[str, Any]) -> None:
    good = rows_of("normal", 1, 3000, 2)
    for bad in (np.nan, np.inf):
        for at in (0, 63, 1500, 2999):
            logits = good.copy()
            logits[0, at] = bad
            rows = Rows(3000)
            rows.set(0, **setting)
            result = rows.sample(logits)[0]
            assert (result["token"], result["error"]) == (-1, lib.PLB_E_LOGITS)
    rows = Rows(3000)
    rows.set(0, **setting)
    assert rows.sample(np.full((1, 3000), -np.inf, np.float32))[0]["error"] == lib.PLB_E_LOGITS


def test_nothing_left_to_choose() -> None:
    logits = np.full((1, 100), -np.inf, np.float32)
    logits[0, 3] = 2
    biases = ffi.new("llama_logit_bias[]", [(3, float("-inf"))])
    rows = Rows(100)
    assert rows.set(0, n_logit_bias=1, logit_bias=biases) == 0
    assert rows.sample(logits)[0]["error"] == lib.PLB_E_NO_CANDIDATE
    assert logits[0, 3] == 2


def test_rows_refuse_what_they_cannot_do() -> None:
    rows = Rows(100, 2)
    grammar = ffi.new("char[]", b'root ::= "a"')
    assert rows.set(0, grammar=grammar) == lib.PLB_E_GRAMMAR
    assert rows.set(0, typical_p=0.5) == lib.PLB_E_SAMPLING
    assert b"path" in ffi.string(lib.plb_rows_error(rows.ptr))
    assert rows.set(0, typical_p=0.5, path=lib.PLB_PATH_AUTO) == 0
    assert rows.set(2) == lib.PLB_E_ARGUMENT
    logits = ffi.new("float[]", 200)
    results = ffi.new("plb_result[]", 2)
    sample = lib.plb_rows_sample
    none = (ffi.NULL, ffi.NULL)
    assert sample(rows.ptr, 2, logits, 100, results, *none) == lib.PLB_E_NO_SLOT
    assert sample(rows.ptr, 1, logits, 99, results, *none) == lib.PLB_E_ARGUMENT
    assert rows.set(1, max_tokens=1, min_tokens=0) == 0
    assert sample(rows.ptr, 2, logits, 100, results, *none) == 0
    assert sample(rows.ptr, 2, logits, 100, results, *none) == lib.PLB_E_SLOT_FINISHED


# -- in the stepper --


@pytest.fixture(scope="module")
def context() -> Iterator[Context]:
    with Model(gguf_path("llama")) as model:
        settings: dict[str, Any] = {"n_ctx": 512, "n_batch": 64, "n_seq_max": 2, "n_threads": 1}
        with Context(model, **settings) as context:
            yield context


def generated(context: Context, sampler: str, params: SamplingParams) -> list[int]:
    prompt = [1, 270, 280, 290, 280]
    context.memory.clear()
    with Stepper(context, sampler=sampler) as stepper:
        stepper.set_slot(0, params, prompt)
        assert stepper.slot(0).path == ("chain" if sampler == "chain" else "fused")
        return generate(stepper, params, prompt)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"top_k": 0, "top_p": 1, "min_p": 0},
        {"repeat_penalty": 1.4, "frequency_penalty": 0.5, "penalty_last_n": 12},
        {"logit_bias": {300: 4.0, 301: float("-inf")}, "presence_penalty": 0.7},
    ],
)
def test_a_text_is_the_same_on_both_paths(context: Context, options: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=80, seed=5, ignore_eog=True, **options)
    chain = generated(context, "chain", params)
    assert chain == generated(context, "auto", params) == generated(context, "fused", params)
    assert len(chain) == 80


def test_which_path(context: Context) -> None:
    grammar = SamplingParams(grammar='root ::= "a"')
    with Stepper(context) as stepper:
        for params, path in (
            (SamplingParams(), "fused"),
            (grammar, "chain"),
            (SamplingParams(typical_p=0.9), "chain"),
        ):
            stepper.set_slot(0, params)
            assert stepper.slot(0).path == path
            stepper.copy_slot(0, 1)
            assert stepper.slot(1).path == path
    with Stepper(context, sampler="fused") as stepper, pytest.raises(ArgumentError, match="path"):
        stepper.set_slot(0, grammar)
    with pytest.raises(ArgumentError, match="auto, chain, fused"):
        Stepper(context, sampler="quick")
