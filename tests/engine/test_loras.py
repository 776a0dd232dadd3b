"""LoRA adapters by request: each gets what it gets alone on a context with just its adapters."""

import asyncio
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pyllamabatch import Engine, LoraAdapter, Model, SamplingParams
from pyllamabatch.errors import ArgumentError, ClosedError, StateError
from pyllamabatch.llama.context import Context
from tests.support import engines as support
from tests.support.decoding import likeliest
from tests.support.engines import EXACT, check_idle
from tests.support.faults import set_fault
from tests.support.models_gguf import gguf_path
from tests.support.models_special import write_lora
from tests.support.speculating import LOOP, always, priced

N_TOKENS = 24
GREEDY = support.greedy(N_TOKENS)
PROMPTS = [[1, *range(10 * i + 20, 10 * i + 26 + 5 * i)] for i in range(4)]
SETS: list[Mapping[str, float]] = [{}, {"a": 1.0}, {"a": 0.5}, {"b": 1.0}, {"b": 1.0, "a": 0.25}]


@pytest.fixture(scope="module")
def adapters(
    model: Model, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, LoraAdapter]]:
    folder = tmp_path_factory.mktemp("loras")
    loaded = {}
    for seed, name in enumerate("ab"):
        path = folder / f"{name}.gguf"
        write_lora(path, seed=seed)
        loaded[name] = LoraAdapter(model, path)
    yield loaded
    for adapter in loaded.values():
        adapter.close()


@pytest.fixture(scope="module")
def alone(model: Model, adapters: dict[str, LoraAdapter]) -> list[list[list[int]]]:
    """By prompt and by set, with the typed layer: one sequence, one context."""
    never = model.vocab.eog_tokens
    expected = []
    for prompt in PROMPTS:
        each = []
        for chosen in SETS:
            with Context(model, n_ctx=256, **EXACT) as context:
                context.set_loras([(adapters[name], scale) for name, scale in chosen.items()])
                each.append(likeliest(context, prompt, N_TOKENS, never=never))
        expected.append(each)
    assert all(len({tuple(tokens) for tokens in each}) == len(SETS) for each in expected)
    return expected


def engine_on(model: Model, adapters: Mapping[str, LoraAdapter], **options: Any) -> Engine:
    options = {"n_seq_max": 6, "n_ctx": 768, "n_batch": 32, "n_ubatch": 16, **options}
    return support.engine_on(model, loras=adapters, **options)


def check_empty(engine: Engine) -> None:
    assert check_idle(engine).finished["error"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {}, {"n_batch": 512, "n_ubatch": 512},
        {"n_ctx": 256, "n_seq_max": 12, "preemption": "recompute"},
        {"n_ctx": 256, "n_seq_max": 12, "preemption": "swap"}, {"kv_unified": False},
        {"prefix_cache": False}, {"n_seq_max": 1},
    ],
    ids=str,
)  # fmt: skip
def test_any_mixture_gets_what_each_gets_alone(
    model: Model,
    adapters: dict[str, LoraAdapter],
    alone: list[list[list[int]]],
    options: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with engine_on(model, adapters, **options) as engine:
        for n_times in range(2):  # the second time with what is cached
            with engine._core.state:  # all are there at the first step
                streams = [
                    [engine.submit(prompt, GREEDY, lora=chosen) for chosen in SETS]
                    for prompt in PROMPTS
                ]
            got = [[stream.result(60).tokens for stream in row] for row in streams]
            assert got == alone, n_times
        if "n_ctx" in options:
            assert engine.stats().preemptions > 0
        if options.get("preemption") == "swap":
            assert engine.stats().swapped_tokens > 0
        assert "failed" not in caplog.text  # a state that is refused is computed again
        check_empty(engine)


def test_a_prefix_is_shared_within_one_set_only(
    model: Model, adapters: dict[str, LoraAdapter], alone: list[list[list[int]]]
) -> None:
    with engine_on(model, adapters, n_ctx=2048) as engine:
        for chosen in SETS:
            engine.submit(PROMPTS[3], GREEDY, lora=chosen).result(60)
        assert engine.stats().prefix_tokens == 0
        tokens = [engine.submit(PROMPTS[3], GREEDY, lora=s).result(60).tokens for s in SETS]
        assert tokens == alone[3]
        assert engine.stats().prefix_tokens == len(SETS) * (len(PROMPTS[3]) - 1)


def test_every_way_to_ask(
    model: Model, adapters: dict[str, LoraAdapter], alone: list[list[list[int]]]
) -> None:
    with engine_on(model, adapters) as engine:
        assert engine.loras == ("a", "b")
        expected = alone[0][1]
        assert engine.submit(PROMPTS[0], GREEDY, lora="a").result(60).tokens == expected
        for zero in ({"a": 1, "b": 0}, {"a": 1.0, "b": 0.0}):
            assert engine.submit(PROMPTS[0], GREEDY, lora=zero).result(60).tokens == expected
        (result,) = engine.generate([PROMPTS[0]], GREEDY, lora="a")
        assert result.tokens == expected
        for stream in engine.submit_n(PROMPTS[0], GREEDY, 3, lora="a"):
            assert stream.result(60).tokens == expected
        with engine.sequence(GREEDY, lora="a") as seq:
            seq.prompt(PROMPTS[0])
            tokens = [seq.sample().token for _ in range(4)]
            with seq.fork() as other:
                tokens.append(other.sample().token)
            assert tokens == expected[:5]

        async def run() -> None:
            tokens = [token.token async for token in engine.stream(PROMPTS[0], GREEDY, lora="a")]
            assert tokens == expected
            (result,) = await engine.agenerate([PROMPTS[0]], GREEDY, lora="a")
            assert result.tokens == expected

        asyncio.run(run())
        assert engine.submit(PROMPTS[0], GREEDY).result(60).tokens == alone[0][0]
        check_empty(engine)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ("c", "the engine's adapters are a, b"),
        ({"a": 1.0, "c": 0.0}, "the engine's adapters are a, b"),
        ({"a": float("nan")}, "finite"),
        ({"a": float("inf")}, "finite"),
        ({"a": "1"}, "finite"),
        ({"a": True}, "finite"),
        (["a"], "a name, or names with scales"),
        (1, "a name, or names with scales"),
    ],
    ids=str,
)
def test_what_there_is_not(
    model: Model, adapters: dict[str, LoraAdapter], lora: Any, reason: str
) -> None:
    with engine_on(model, adapters) as engine:
        with pytest.raises(ArgumentError, match=reason):
            engine.submit(PROMPTS[0], GREEDY, lora=lora)
        with pytest.raises(ArgumentError, match=reason):
            engine.sequence(GREEDY, lora=lora)
        assert engine.stats().submitted == 0


def test_adapters_that_an_engine_can_not_take(
    model: Model, adapters: dict[str, LoraAdapter], tmp_path: Path
) -> None:
    write_lora(tmp_path / "gone.gguf")
    gone = LoraAdapter(model, tmp_path / "gone.gguf")
    gone.close()
    with pytest.raises(ClosedError):
        engine_on(model, {"gone": gone})
    with pytest.raises(ArgumentError, match="a name must be text"):
        engine_on(model, {1: adapters["a"]})  # type: ignore[dict-item]
    with Model(gguf_path("llama")) as twin, pytest.raises(ArgumentError, match="another model"):
        engine_on(twin, adapters)
    with engine_on(model, {}) as engine, pytest.raises(ArgumentError, match="none: see Engine"):
        engine.submit(PROMPTS[0], GREEDY, lora="a")


def test_an_adapter_may_be_closed_under_an_engine(
    model: Model, alone: list[list[list[int]]], tmp_path: Path
) -> None:
    write_lora(tmp_path / "a.gguf", seed=0)
    adapter = LoraAdapter(model, tmp_path / "a.gguf")
    with engine_on(model, {"a": adapter}) as engine:
        adapter.close()
        for chosen in (0, 1, 2):
            got = engine.submit(PROMPTS[1], GREEDY, lora=SETS[chosen]).result(60).tokens
            assert got == alone[1][chosen]
        loaded = weakref.ref(engine._inputs.loras._of["a"].ptr)
    assert loaded() is None  # the engine was the last to hold it


def test_a_snapshot_knows_its_adapters(
    model: Model, adapters: dict[str, LoraAdapter], alone: list[list[list[int]]]
) -> None:
    with engine_on(model, adapters) as engine:
        # The context has others when it is saved.
        running = engine.submit(PROMPTS[3], SamplingParams(temperature=0, max_tokens=100))
        with engine.sequence(GREEDY, lora={"b": 1.0, "a": 0.25}) as seq:
            seq.prompt(PROMPTS[2])
            tokens = [seq.sample().token for _ in range(3)]
            saved = seq.snapshot()
        running.cancel()
        assert tokens == alone[2][4][:3]
    other = {"x": adapters["a"], "y": adapters["b"]}
    with engine_on(model, other, n_seq_max=2) as engine:
        for wrong in (None, "x", {"x": 0.25, "y": 0.5}):
            with engine.sequence(lora=wrong) as seq, pytest.raises(StateError, match="adapters"):
                seq.restore(saved)
        with engine.sequence(lora={"x": 0.25, "y": 1.0}) as seq:
            seq.restore(saved)
            assert [seq.sample().token for _ in range(5)] == alone[2][4][3:8]
            assert engine.stats().swapped_tokens > 0  # the state itself, not its tokens again


def test_a_fresh_context_has_the_adapters_that_were_applied(
    model: Model, adapters: dict[str, LoraAdapter], alone: list[list[list[int]]]
) -> None:
    with engine_on(model, adapters) as engine:
        for step in (1, 3, 9):
            set_fault(engine._stepper, step, -3, 1, 2)
            streams = [engine.submit(PROMPTS[1], GREEDY, lora=chosen) for chosen in SETS]
            assert [stream.result(60).tokens for stream in streams] == alone[1]
        assert engine.stats().restarts == 3
        check_empty(engine)


def test_a_cancel_waits_for_one_step_of_each_set(
    model: Model, adapters: dict[str, LoraAdapter]
) -> None:
    with engine_on(model, adapters, n_ctx=2048, speculate=None) as engine:
        calls: list[int] = []  # steps that each may have
        turns: list[int] = []  # the call that each begins with
        cancelled = threading.Event()
        core: Any = engine._core
        compute, parts = core._stepper.compute, core.calls.of
        long = support.greedy(500)

        def begin(step: Any) -> Any:
            turns.append(len(calls))
            return parts(step)

        def computed(slots: Any, n_steps: int, n_before: int = 0, n_pad: int = 0) -> Any:
            if len(calls) >= 20 and turns[-1] == len(calls) and not cancelled.is_set():
                streams[0].cancel()
                cancelled.set()
                del calls[:]
            calls.append(n_steps)
            return compute(slots, n_steps, n_before, n_pad)

        with core.state:
            streams = [engine.submit(PROMPTS[0], long, lora=chosen) for chosen in SETS[:3]]
            core._stepper.compute, core.calls.of = computed, begin
        assert cancelled.wait(60)
        assert streams[0].wait(60).finish_reason == "cancelled"
        for stream in streams:
            stream.cancel()
            stream.wait(60)
        assert calls[:3] == [8, 1, 1]  # and the first one comes back when it is interrupted


def test_each_set_has_drafts_of_its_own(model: Model, adapters: dict[str, LoraAdapter]) -> None:
    """One ends while others go on, and what is told of a request's drafts is its own."""
    params = [support.greedy(n, logit_bias=LOOP) for n in (17, 60, 40)]
    how: dict[str, Any] = {"speculate": "ngram", "policy": always(4, 8), "cost": None}
    answers = []
    for options in ({}, how):
        with engine_on(model, adapters, **options) as engine:
            streams = [
                engine.submit(PROMPTS[0] * 2, one, lora=chosen)
                for one, chosen in zip(params, SETS, strict=False)
            ]
            results = [stream.result(60) for stream in streams]
            stats = engine.stats()
            answers.append([result.tokens for result in results])
            check_empty(engine)
    assert answers[0] == answers[1]
    assert sum(result.n_drafted for result in results) == stats.drafted_tokens > 0
    assert sum(result.n_accepted for result in results) == stats.accepted_tokens > 0


def test_what_one_set_has_lost_no_other_one_may_lose_again(
    model: Model, adapters: dict[str, LoraAdapter]
) -> None:
    """Of a step's credit, 10 seconds: each call loses four."""
    found: list[tuple[float, float | None]] = []
    how: dict[str, Any] = {"speculate": "ngram", "policy": priced(0.0), "cost": None, "n_batch": 64}
    with engine_on(model, adapters, **how) as engine:
        core: Any = engine._core
        compute, drafting = core._stepper.compute, core.scheduler.drafting
        credit = core._stepper.drafts.credit
        observe = drafting.observe

        def computed(*args: Any) -> Any:
            before = float(credit[0])
            run = compute(*args)
            credit[0] = before - 4
            if core.calls._running[0].drafts:
                found.append((before, None))
            return run

        def observed(slots: Any, owner: Any, drafted: Any, *args: Any, asked: bool) -> None:
            if asked:
                found[-1] = found[-1][0], drafted.gained
            observe(slots, owner, drafted, *args, asked=asked)

        core._stepper.compute, drafting.observe = computed, observed
        params = support.greedy(40)
        with core.state:  # both are there at its first step
            streams = [engine.submit(PROMPTS[0] * 2, params, lora=chosen) for chosen in SETS[:2]]
        assert [len(stream.result(60).tokens) for stream in streams] == [40, 40]
    assert set(found) == {(10.0, -4.0), (6.0, -4.0)}
