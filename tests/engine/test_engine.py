"""Engine on real contexts: what a caller sees.

That tokens are those of solo runs is test_invariance_engine's; here the settings are such that
kernels for one row and for many agree but for the order of their F32 sums.
"""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.request import Request
from pyllamabatch.engine.stats import EngineStats
from pyllamabatch.engine.stream import Stream
from pyllamabatch.errors import (
    ArgumentError,
    ClosedError,
    EngineClosed,
    GrammarError,
    RequestTooLong,
    SamplingError,
    TokenizeError,
    UnsupportedOperation,
)
from pyllamabatch.llama.model import Model
from tests.support import engines as support
from tests.support.engines import check_idle, engine_on, held
from tests.support.models_gguf import EOS, N_VOCAB, gguf_path

PROMPT = [1, 20, 30, 40, 50]
small = partial(engine_on, n_ctx=512)
greedy = partial(support.greedy, ignore_eog=False)


@pytest.fixture(scope="module")
def shared(model: Model) -> Iterator[Engine]:
    with small(model) as engine:
        yield engine


def check_balanced(engine: Engine) -> EngineStats:
    stats = engine.stats()
    assert stats.submitted == stats.waiting + stats.running + sum(stats.finished.values())
    assert stats.rows == stats.decode_rows + stats.prefill_rows
    return check_idle(engine) if stats.waiting == stats.running == 0 else stats


def test_stream_result_and_generate_say_the_same(shared: Engine) -> None:
    stream = shared.submit(PROMPT, greedy(logprobs=2))
    tokens = list(stream)
    result = stream.result(30)
    assert [token.token for token in tokens] == result.tokens == stream.tokens
    assert "".join(token.text for token in tokens) == result.text == stream.text
    assert "".join(stream.text_stream()) == result.text
    assert (result.finish_reason, result.n_prompt, result.n_generated) == ("length", 5, 8)
    assert result.ttft_s is not None
    assert 0 < result.ttft_s <= result.e2el_s
    assert result.logprobs == [token.logprob for token in tokens]
    for token in tokens:
        assert token.top_logprobs is not None
        assert len(token.top_logprobs) == 2
        assert max(token.top_logprobs, key=token.top_logprobs.__getitem__) == token.token
        assert token.logprob is not None
        assert token.logprob == pytest.approx(token.top_logprobs[token.token], abs=1e-5)
        assert token.logprob < 0
    again = shared.generate([PROMPT, np.array(PROMPT)], greedy())
    assert [r.tokens for r in again] == [result.tokens] * 2
    check_balanced(shared)


def test_text_and_its_tokens_are_the_same_prompt(model: Model, shared: Engine) -> None:
    text = "Hello, wörld"
    tokens = model.vocab.tokenize(text)
    a, b = shared.generate([text, tokens], greedy())
    assert a.tokens == b.tokens
    assert a.n_prompt == len(tokens)
    plain = shared.generate([text], greedy(), add_special=False)[0]
    assert plain.n_prompt == len(tokens) - 1


def test_the_prompt_may_change_after_submit(shared: Engine) -> None:
    prompt = np.array(PROMPT, np.int32)
    streams = [shared.submit(prompt, greedy()) for _ in range(8)]
    prompt[:] = 7
    assert {tuple(stream.result(30).tokens) for stream in streams} == {
        tuple(shared.generate([PROMPT], greedy())[0].tokens)
    }


def test_end_of_generation_is_not_part_of_the_tokens(shared: Engine) -> None:
    result = shared.submit(PROMPT, greedy(logit_bias={EOS: 1000.0})).result(30)
    assert (result.finish_reason, result.tokens, result.text) == ("stop", [], "")
    assert result.stop == EOS
    assert result.ttft_s is None


def test_a_stop_token_ends_it(shared: Engine) -> None:
    tokens = shared.submit(PROMPT, greedy()).result(30).tokens
    stop = tokens[3]
    result = shared.submit(PROMPT, greedy(stop_token_ids=(stop,))).result(30)
    assert (result.finish_reason, result.stop) == ("stop", stop)
    assert result.tokens == tokens[: tokens.index(stop)]


def test_one_that_can_not_be_sampled_fails_alone(shared: Engine) -> None:
    expected = shared.generate([PROMPT], greedy())[0].tokens
    nothing = greedy(logit_bias=dict.fromkeys(range(N_VOCAB), float("-inf")))
    results = shared.generate([PROMPT] * 3, [greedy(), nothing, greedy()])
    assert [result.finish_reason for result in results] == ["length", "error", "length"]
    assert results[0].tokens == results[2].tokens == expected
    assert isinstance(results[1].error, SamplingError)
    check_balanced(shared)


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ([], greedy(), ArgumentError, "has no tokens"),
        ([1, N_VOCAB], greedy(), ArgumentError, rf"prompt\[1\]={N_VOCAB}"),
        ([1, -1], greedy(), ArgumentError, r"prompt\[1\]=-1"),
        ([[1, 2]], greedy(), ArgumentError, "flat sequence"),
        ([1.5], greedy(), ArgumentError, "integers"),
        ([2**40], greedy(), ArgumentError, rf"prompt\[0\]={2**40}"),
        (b"\xff\xfe", greedy(), ArgumentError, "flat sequence of integers"),
        (None, greedy(), ArgumentError, "integers"),
        ("\ud800", greedy(), TokenizeError, "not valid UTF-8"),
        ([1] * 513, greedy(1), RequestTooLong, "513 tokens.*max_tokens=1.*513 KV cells.*512"),
        ([1] * 500, greedy(14), RequestTooLong, "513 KV cells"),
        (PROMPT, greedy(grammar="root ::= ("), GrammarError, "line 1"),
        (PROMPT, greedy(stop_token_ids=(N_VOCAB,)), ArgumentError, "stop_token_ids="),
        (PROMPT, greedy(logit_bias={N_VOCAB: 1.0}), ArgumentError, "logit_bias"),
        (PROMPT, greedy(logprobs=21), ArgumentError, r"logprobs=21: must be in 0\.\.20"),
        (PROMPT, {"temperature": 0}, ArgumentError, "must be SamplingParams"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_requests_raise_at_submit(
    shared: Engine, prompt: Any, params: Any, error: type[Exception], words: str
) -> None:
    before = shared.stats().submitted
    with pytest.raises(error, match=words):
        shared.submit(prompt, params)
    with pytest.raises(error, match=words):
        shared.generate([PROMPT, prompt], [greedy(), params])
    assert shared.stats().submitted == before  # not even the good one has started
    assert shared.submit(PROMPT, greedy()).result(30).finish_reason == "length"


def test_a_text_without_tokens(shared: Engine) -> None:
    with pytest.raises(ArgumentError, match="has no tokens"):
        shared.submit("", greedy(), add_special=False)
    with pytest.raises(ArgumentError, match="must be a list of prompts"):
        shared.generate("one prompt")
    with pytest.raises(ArgumentError, match="one per prompt"):
        shared.generate([PROMPT], [greedy(), greedy()])
    assert shared.generate([]) == []


def test_a_request_may_fill_the_cache_to_the_last_cell(shared: Engine) -> None:
    long = [1] * 505
    results = shared.generate([long, PROMPT, long], greedy(8))
    assert [result.n_generated for result in results] == [8, 8, 8]
    assert results[0].tokens == results[2].tokens
    check_balanced(shared)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("n_seq_max", 0, "n_seq_max"),
        ("n_seq_max", 257, "n_seq_max"),
        ("n_ctx", -1, "n_ctx"),
        ("max_waiting", 0, "max_waiting"),
        ("max_waiting", 1.5, "max_waiting"),
        ("patience", -1, "patience"),
        ("policy", "mlfqq", "mlfq"),
        ("preemption", "sometimes", "preemption"),
        ("preemption", None, "preemption"),
        ("max_restarts", -1, "max_restarts"),
        ("max_restarts", 1.5, "max_restarts"),
        ("max_restarts", True, "max_restarts"),
        ("embeddings", True, "embeddings=True: the engine sets it itself"),
        ("n_outputs_max_per_seq", 1, "n_outputs_max_per_seq=1: the engine sets it itself"),
    ],
)
def test_bad_engines(model: Model, option: str, value: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        small(model, **{option: value})


def test_encoders_are_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.__dict__, "has_encoder", True)
    with pytest.raises(UnsupportedOperation, match="has an encoder"):
        small(model)


def test_cancel_ends_it_within_a_step_and_no_other(shared: Engine) -> None:
    expected = shared.generate([PROMPT], greedy(100))[0].tokens
    with held(shared):
        long = [shared.submit(PROMPT, greedy(400)) for _ in range(3)]
        neighbour = shared.submit(PROMPT, greedy(100))
        next(iter(long[0]))
        assert all(stream.cancel() for stream in long)
        results = [stream.result(30) for stream in long]
    for stream, result in zip(long, results, strict=True):
        assert result.finish_reason == "cancelled"
        assert result.n_generated < 400
        assert expected[: result.n_generated] == result.tokens[:100]
        assert list(stream)[-1:] == list(stream)[-1:]
        assert not stream.cancel()
    assert neighbour.result(30).tokens == expected
    check_balanced(shared)


def test_many_threads_at_once(model: Model) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(5, N_VOCAB, n).tolist() for n in random.integers(1, 30, 60)]
    with small(model) as engine:
        expected = [r.tokens for r in engine.generate(prompts, greedy(5))]

        def work(i: int) -> list[int] | None:
            stream = engine.submit(prompts[i], greedy(5))
            if i % 5 == 0:
                stream.cancel()
            tokens = [token.token for token in stream] if i % 2 else stream.result(60).tokens
            return None if stream.result(60).finish_reason == "cancelled" else tokens

        with ThreadPoolExecutor(16) as pool:
            got = list(pool.map(work, range(60)))
        for i, tokens in enumerate(got):
            assert tokens == expected[i] or (i % 5 == 0 and tokens is None)
        stats = check_balanced(engine)
        assert stats.submitted == 120


def test_stats_are_consistent_at_every_moment(model: Model) -> None:
    with small(model, n_ctx=256) as engine:
        with engine._core.state:  # all of them meet
            streams = [engine.submit(PROMPT, greedy(100)) for _ in range(8)]
        seen = []
        while not all(stream.done for stream in streams):
            seen.append(check_balanced(engine))
        stats = check_balanced(engine)
    assert stats.finished == {"stop": 0, "length": 8, "cancelled": 0, "deadline": 0, "error": 0}
    assert stats.tokens == 800
    assert stats.preemptions > 0
    assert stats.admissions == 8 + stats.preemptions
    assert stats.recomputed_rows <= stats.prefill_rows - 8 * (len(PROMPT) - 1)
    assert [s.steps for s in seen] == sorted(s.steps for s in seen)


def test_a_done_callback_may_submit(model: Model) -> None:
    done = threading.Event()
    with small(model) as engine:
        results = []

        def again(stream: Any) -> None:
            results.append(stream.result())
            if len(results) < 3:
                engine.submit(PROMPT, greedy()).add_done_callback(again)
            else:
                engine.stats()
                done.set()

        engine.submit(PROMPT, greedy()).add_done_callback(again)
        assert done.wait(30)
    assert len({tuple(result.tokens) for result in results}) == 1


def test_a_trace_of_less_than_no_step_is_refused(shared: Engine) -> None:
    assert len(shared.trace(0)) == 0
    with pytest.raises(ArgumentError, match="n=-1: must be"):
        shared.trace(-1)


@pytest.mark.parametrize(
    "wait",
    [
        lambda stream: stream.result(),
        lambda stream: list(stream),
        lambda stream: stream.wait_for_tokens(2),
        lambda stream: stream.wait(1000),
    ],
    ids=["result", "iter", "tokens", "timeout"],
)
def test_a_done_callback_that_waits_for_another_stream_is_told_that_it_can_not(
    model: Model, wait: Callable[[Stream], object]
) -> None:
    told = Future[str]()

    def waits(stream: Stream) -> None:
        assert stream.result().finish_reason == "length"
        try:
            wait(engine.submit(PROMPT, greedy()))
        except UnsupportedOperation as error:
            told.set_result(str(error))

    with small(model) as engine:
        with engine._core.state:  # it does not end before it has a callback
            engine.submit(PROMPT, greedy(ignore_eog=True)).add_done_callback(waits)
        assert "a callback can't wait" in told.result(60)


def test_close_finishes_what_is_open(model: Model) -> None:
    engine = small(model)
    streams = [engine.submit(PROMPT, greedy()) for _ in range(10)]
    engine.close()
    assert [stream.wait(0).finish_reason for stream in streams] == ["length"] * 10
    with pytest.raises(EngineClosed):
        engine.submit(PROMPT, greedy())
    engine.close()
    engine.close(wait=False)
    assert engine.closed
    assert repr(engine) == "<Engine closed>"
    assert engine.stats().submitted == 10


def test_close_now_cancels_what_is_open(model: Model) -> None:
    engine = small(model)
    with held(engine):
        streams = [engine.submit(PROMPT, greedy(400)) for _ in range(10)]
        engine.close(wait=False)
    reasons = [stream.wait(0).finish_reason for stream in streams]
    assert set(reasons) == {"cancelled"}
    assert engine.stats().finished["cancelled"] == 10
    with pytest.raises(ClosedError):
        engine._core._device.memory.pos_max(0)  # the context is gone


def test_close_waits_no_longer_than_it_is_told(model: Model) -> None:
    engine = small(model)
    with held(engine):
        streams = [engine.submit(PROMPT, greedy(500)) for _ in range(20)]
        engine.close(timeout=0.05)
    assert all(stream.done for stream in streams)
    assert streams[-1].wait(0).finish_reason == "cancelled"


def test_an_exception_in_the_with_block_closes_at_once(model: Model) -> None:
    streams = []

    def fail() -> None:
        engine = small(model)
        with held(engine), engine:
            streams.append(engine.submit(PROMPT, greedy(500)))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    stream = streams[0]
    assert stream.wait(0).finish_reason == "cancelled"


def test_results_outlive_engine_and_model() -> None:
    with Model.default() as model, small(model) as engine:
        stream = engine.submit("1, 2, 3,", greedy(5, ignore_eog=True))
        stream.result(60)
    assert stream.text == stream.result().text == "".join(t.text for t in stream)
    assert len(stream.text) > 0


def test_a_closed_model_does_not_disturb_its_engine() -> None:
    model = Model(gguf_path("llama"))
    with small(model) as engine:
        model.close()
        stream = engine.submit(PROMPT, greedy())
        assert stream.result(30).finish_reason == "length"
        assert len(stream.text) > 0
        with pytest.raises(ClosedError):
            engine.submit("a text would need the vocabulary", greedy())
        assert engine.submit(PROMPT, greedy()).result(30).text == stream.text


def test_a_forgotten_engine_ends_by_itself_but_not_under_a_stream(model: Model) -> None:
    stream = small(model).submit(PROMPT, greedy(50))
    gc.collect()
    assert stream.result(30).finish_reason == "length"
    engine = small(model)
    thread = engine._core.thread
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()


def test_what_has_ended_is_freed_without_a_search_for_cycles(model: Model) -> None:
    """Its sampling state, its prompt and its text with it."""

    def n_requests() -> int:
        return sum(isinstance(one, Request) for one in gc.get_objects())

    with small(model) as engine:
        engine.generate([PROMPT], greedy())
        engine.drain()
        gc.collect()
        gc.disable()
        try:
            before = n_requests()
            engine.resume()
            engine.generate([PROMPT] * 20, greedy())
            engine.drain()
            assert n_requests() < before + 5  # a thread may still have the last one
        finally:
            gc.enable()


def test_a_thread_that_prepares_a_request_is_waited_for(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small(model)
    inside, go_on = threading.Event(), threading.Event()
    new_slot = engine._stepper.new_slot

    def slow(*args: Any) -> Any:
        inside.set()
        assert go_on.wait(10)
        return new_slot(*args)

    monkeypatch.setattr(engine._stepper, "new_slot", slow)
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(engine.submit, PROMPT, greedy())
        assert inside.wait(10)
        closing = pool.submit(engine.close)
        time.sleep(0.05)
        assert not closing.done()
        go_on.set()
        closing.result(30)
        with pytest.raises(EngineClosed):
            late.result(30)
