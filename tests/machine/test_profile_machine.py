"""An engine on a profile machine does all that it does on a device, in the profile's time."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest

from pyllamabatch.cost.profile import shipped_names, shipped_profile
from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError, PyllamabatchError, UnsupportedOperation
from pyllamabatch.machine.profile_machine import SENTENCE, ProfileMachine
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.engines import check_idle, held, stopped_clock
from tests.support.machines import FASTER, M2, fast_profile


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fast_profile(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def engine(fast: Path) -> Iterator[Engine]:
    with Engine(machine=fast, n_seq_max=4) as one:
        yield one


def text_of(n: int) -> str:
    """Of n tokens: the vocabulary is one of bytes."""
    return (SENTENCE * (n // len(SENTENCE) + 1))[:n]


def test_answers_say_that_they_are_of_no_model(engine: Engine) -> None:
    results = engine.generate(["a", "bc", "def", "g", "hi"], SamplingParams(max_tokens=100))
    assert [r.text for r in results] == [text_of(100)] * 5
    assert {r.finish_reason for r in results} == {"length"}
    assert check_idle(engine).finished["length"] >= 5


def test_each_visible_gpu_is_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, names = fast_profile(tmp_path), set()
    for gpu in ("", "0", "1", "MIG-GPU-1/2/0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpu)
        a, b = ProfileMachine.named(fast), ProfileMachine.named(fast)
        end = a.queue.reserve(30.0, 0)[1]
        assert b.queue.reserve(0.0, 0)[0] == end  # the same GPU
        names.add(a.name)
    assert len(names) == 4
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert ProfileMachine.named(fast).name in names


def test_a_step_takes_what_the_profile_says(fast: Path) -> None:
    machine = ProfileMachine.named(fast)
    cost = machine.cost(unified=False, n_ubatch=512)
    with Engine(machine=fast, n_seq_max=2, prefix_cache=False, cost=None) as alone:
        began = perf_counter()
        alone.submit("12345678", SamplingParams(max_tokens=30)).wait()
        took, table = perf_counter() - began, alone.trace()
    predicted = [cost.predict(8, 8, 0, 1)] if table["rows"][0] == 8 else []
    first = 8 + (len(predicted) == 0)  # a token that begins a text
    predicted = [cost.predict(first, first, 0, 1)]
    predicted += [cost.predict(1, 0, first + i, 1) for i in range(29)]
    assert table["decode_ns"].tolist() == pytest.approx([1e9 * s for s in predicted], abs=2)
    assert table["sampled"].tolist() == [1] * 30
    assert took >= sum(predicted)
    real = shipped_profile(M2).samples[0].seconds
    assert machine.profile.samples[0].seconds == pytest.approx(real / FASTER)
    machine.queue.close()


def test_streams_stops_deadlines_and_cancelling(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = engine.submit("x", SamplingParams(max_tokens=200, stop=["wrote"])).wait()
    assert (stopped.text, stopped.finish_reason) == (" No model ", "stop")
    token = engine.model.vocab.tokenize(":", add_special=False)[0]
    params = SamplingParams(max_tokens=200, stop_token_ids=[int(token)])
    assert engine.submit("x", params).wait().text == SENTENCE.partition(":")[0]
    with held(engine, 20):
        read = engine.submit("x", SamplingParams(max_tokens=500))
        assert "".join(token.text for token in islice(read, 9)) == text_of(9)
        read.cancel()
        assert read.wait().finish_reason == "cancelled"
        begun = stopped_clock(monkeypatch)
        stream = engine.submit("x", SamplingParams(max_tokens=2000), timeout=0.05)
        next(iter(stream))
        begun.set()
        late = stream.wait()
        assert late.finish_reason == "deadline"
        assert 0 < len(late.tokens) < 2000
    scored = engine.submit("x", SamplingParams(max_tokens=3, logprobs=1)).wait()
    assert scored.logprobs == [0.0] * 3
    assert scored.top_logprobs == [{token: 0.0} for token in scored.tokens]
    check_idle(engine)


def test_prefixes_are_cached(engine: Engine) -> None:
    prompt = "the same prompt of more than sixteen tokens " * 4
    engine.submit(prompt, SamplingParams(max_tokens=2)).wait()
    before = engine.stats().prefix_tokens
    engine.submit(prompt + "and more", SamplingParams(max_tokens=2)).wait()
    assert engine.stats().prefix_tokens - before >= len(prompt)


def test_a_cell_of_several_sequences_takes_time_once(fast: Path) -> None:
    """A pool has the cells of a common prefix once, of sequences that run and of cached ones."""
    cost = ProfileMachine.named(fast).cost(unified=True, n_ubatch=512)
    with Engine(machine=fast, n_seq_max=4, n_ctx=4096, kv_unified=True, cost=None) as pool:
        for i in range(3):
            prompt = "the same prefix of a thousand tokens" * 28 + str(i)
            pool.submit(prompt, SamplingParams(max_tokens=8)).wait()
        last, used = pool.trace(1)[0], pool.stats().kv_cached
    assert used < 2 * len(prompt)
    assert last["decode_ns"] == pytest.approx(1e9 * cost.predict(1, 0, used - 1, 1), abs=2)


@pytest.mark.parametrize("preemption", ["recompute", "swap", "auto"])
def test_sequences_that_do_not_fit_are_preempted(fast: Path, preemption: Any) -> None:
    with Engine(
        machine=fast, n_seq_max=4, n_ctx=512, kv_unified=True, preemption=preemption
    ) as pool:
        results = pool.generate(["p" * 60] * 4, SamplingParams(max_tokens=200))
        assert [r.text for r in results] == [text_of(200)] * 4
        stats = check_idle(pool)
    assert stats.preemptions > 0
    assert (stats.swapped_tokens > 0) == (preemption == "swap")


def test_streams_become_a_pool(fast: Path) -> None:
    with Engine(machine=fast, n_seq_max=2, n_ctx=2048) as streams:
        short = streams.submit("x", SamplingParams(max_tokens=300))
        long = streams.submit("y" * 1500, SamplingParams(max_tokens=30)).wait()
        assert long.text == text_of(30)
        assert short.wait().text == text_of(300)
        assert streams.layout.startswith("one pool")
        assert streams.limits.unified


def test_a_context_made_as_a_pool_has_no_streams_to_go_back_to(fast: Path) -> None:
    with Engine(machine=fast, n_seq_max=2, n_ctx=2048, kv_unified=True) as pool:
        with pytest.raises(ArgumentError, match="made as a pool"):
            pool._context.renew(0)
        assert pool._context.n_ctx == 2048


def test_interactive_sequences(engine: Engine, tmp_path: Path) -> None:
    with engine.sequence() as one:
        one.prompt("a prompt that is long enough to be shared")
        text = "".join(one.sample().text for _ in range(12))
        with one.fork() as two:
            assert two.sample().text == text_of(1)  # its sampling begins there
        assert text + one.sample().text == text_of(13)
        with pytest.raises(UnsupportedOperation, match="profile machine"):
            one.save(tmp_path / "state")


def test_engines_share_one_gpu(fast: Path) -> None:
    """Of two that decode at once, each has half of the machine: no step overlaps another one."""
    with Engine(machine=fast, n_seq_max=1) as a, Engine(machine=fast, n_seq_max=1) as b:
        streams = [each.submit("x", SamplingParams(max_tokens=150)) for each in (a, b)]
        for stream in streams:
            stream.wait()
        tables = [each.trace() for each in (a, b)]
    device = sum(int(table["decode_ns"].sum()) for table in tables)
    first = min(table["t_start_ns"][0] for table in tables)
    last = max(
        table["t_start_ns"][-1] + table["decode_ns"][-1] + table["sync_ns"][-1] for table in tables
    )
    assert last - first >= device


def test_engines_of_a_profile_with_new_graphs() -> None:
    """Steps with a graph that is reused are told from those that make one."""
    with Engine(machine="nvidia-h200-gemma-3-1b-q4_k_m", n_seq_max=2, cost=None) as cuda:
        cuda.submit("x", SamplingParams(max_tokens=40)).wait()
        table = cuda.trace()
    assert table["reused"].tolist() == [0] + [1] * 39
    assert table["decode_ns"][0] > table["decode_ns"][5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"machine": "m2-ultra-gemma-3-4b-q4_0"}, f"did you mean {M2}"),
        ({"machine": "nothing at all"}, "x86-2-core-amx"),
        ({"machine": M2, "n_seq_maxx": 4}, "n_seq_maxx"),
        ({"machine": M2, "kv_unified": "perhaps"}, "kv_unified"),
        ({"machine": M2, "embeddings": True}, "embeddings"),
        ({}, "model=None"),
    ],
)
def test_what_there_is_not(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Engine(**options)


def test_what_it_can_not_do(engine: Engine) -> None:
    for params in (SamplingParams(grammar='root ::= "x"'), SamplingParams(json_schema={})):
        with pytest.raises(UnsupportedOperation, match="no logits"):
            engine.submit("x", params)
    with pytest.raises(ArgumentError, match="logprobs"):
        engine.submit("x", SamplingParams(logprobs=500))
    with pytest.raises(PyllamabatchError, match="adapter"):
        Engine(machine=M2, loras={"style": None})  # type: ignore[dict-item]


def test_every_shipped_profile_is_a_machine() -> None:
    for name in shipped_names():
        machine = ProfileMachine.named(name)
        for unified in (False, True):
            cost = machine.cost(unified=unified, n_ubatch=512)
            seconds = np.array([cost.predict(n, 0, 128 * n, n) for n in (1, 8, 32)])
            assert (seconds > 0).all()
        machine.queue.close()
