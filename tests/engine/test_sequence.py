"""Interactive sequences on real contexts: what they give is what raw calls and requests give."""

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.sequence import Sequence
from pyllamabatch.engine.stream import Stream
from pyllamabatch.errors import (
    ArgumentError,
    Cancelled,
    ClosedError,
    DecodeError,
    EngineClosed,
    EngineDraining,
    GrammarError,
    RequestTooLong,
    SamplingError,
    StateError,
    UnsupportedOperation,
)
from pyllamabatch.llama.grammar import Grammar
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import Window
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support import engines as support
from tests.support.decoding import loaded
from tests.support.engines import check_idle, greedy, held
from tests.support.faults import set_fault
from tests.support.models_gguf import EOS, N_VOCAB, Architecture
from tests.support.served import until

PROMPT = [1, 20, 30, 40, 50]
GREEDY = greedy(12)
engine_on = partial(support.engine_on, n_ctx=1024)


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    with engine_on(model) as engine:
        yield engine


def drive(sequence: Sequence, n: int) -> list[int]:
    return [sequence.sample().token for _ in range(n)]


def test_it_gives_what_a_request_gives(architecture: Architecture) -> None:
    prompt = [1, *range(10, 40)]
    with engine_on(loaded(architecture.name), n_batch=16) as engine:
        expected = engine.submit(prompt, GREEDY).result(60).tokens
        with engine.sequence(GREEDY) as sequence, engine.sequence() as copy:
            sequence.prompt(prompt[:20])
            sequence.prompt(prompt[20:])
            assert sequence.position == 31
            assert drive(sequence, 12) == expected
            assert sequence.tokens == prompt + expected
            sequence.trim(31 + 4)
            assert drive(sequence, 8) == expected[4:]
            sequence.trim(10)
            sequence.prompt(prompt[10:])
            assert drive(sequence, 2) == expected[:2]
            copy.restore(sequence.snapshot())
            assert drive(sequence, 10) == drive(copy, 10) == expected[2:]
        check_idle(engine)


def test_text_pieces_and_log_probabilities(embedded_model: Model) -> None:
    params = greedy(8, logprobs=0)
    with engine_on(embedded_model) as engine:
        expected = engine.submit("Copy: héllo ✓.", params).result(60)
        with engine.sequence(params) as sequence:
            sequence.prompt("Copy: héllo ✓.")
            sampled = [sequence.sample() for _ in range(8)]
    assert [one.token for one in sampled] == expected.tokens
    assert "".join(one.text for one in sampled) == expected.text
    text = b"".join(one.piece for one in sampled).decode("utf-8", "replace")
    assert text.startswith(expected.text)
    assert expected.logprobs is not None
    assert [one.logprob for one in sampled] == pytest.approx(expected.logprobs, abs=1e-4)


def test_one_that_was_swapped_out_is_restored_from_a_snapshot(model: Model) -> None:
    """The state that it brings takes the place of the one that lies in the host's memory."""
    options: dict[str, Any] = {"n_seq_max": 1, "preemption": "swap", "prefix_cache": False}
    with engine_on(model, patience=0.01, **options) as engine:
        with engine.sequence(GREEDY) as one, engine.sequence(GREEDY) as other:
            one.prompt([1, *range(20, 60)])
            data = one.snapshot()
            expected = drive(one, 6)
            other.prompt(PROMPT)
            other.sample()
            assert len(engine._core.kv.space) == 1
            one.restore(data)
            assert drive(one, 6) == expected
        check_idle(engine)
        assert len(engine._core.kv.space) == 0


def test_an_end_token_is_said_once_and_the_sequence_goes_on(engine: Engine) -> None:
    with engine.sequence(SamplingParams(temperature=0, logit_bias={EOS: 1000.0})) as sequence:
        sequence.prompt(PROMPT)
        sampled = sequence.sample()
        assert (sampled.token, sampled.end, sampled.logprob) == (EOS, True, None)
        assert sequence.tokens == [*PROMPT, EOS]
        assert sequence.sample().end  # it may be asked for more
        sequence.prompt([60, 61])
        assert sequence.sample().end
        assert sequence.position == 10
        sequence.trim(5)
        assert sequence.sample().end
    check_idle(engine)


def test_a_stop_token_is_an_end(engine: Engine) -> None:
    token = engine.submit(PROMPT, GREEDY).result(60).tokens[2]
    params = SamplingParams(temperature=0, ignore_eog=True, stop_token_ids=(token,))
    with engine.sequence(params) as sequence:
        sequence.prompt(PROMPT)
        ends = [sequence.sample().end for _ in range(3)]
    assert ends[-1]
    assert sequence.tokens.index(token, 5) == 5 + ends.index(True)


def test_a_fork_knows_the_same_and_goes_its_own_way(engine: Engine) -> None:
    with engine.sequence(GREEDY) as sequence:
        sequence.prompt(PROMPT)
        first = drive(sequence, 4)
        with sequence.fork() as fork:
            assert fork.tokens == sequence.tokens
            assert drive(fork, 4) == drive(sequence, 4)
            fork.prompt([7, 8])
            assert fork.position == sequence.position + 2
        assert drive(sequence, 4) == engine.submit(PROMPT, GREEDY).result(60).tokens[8:]
        assert sequence.tokens[5:9] == first
    check_idle(engine)


def test_a_snapshot_goes_on_in_another_engine(model: Model) -> None:
    bias = {300: 0.5, 5: float("-inf")}
    grammar = Grammar("root ::= .*", thinking_ends=((3,), (4, 5)))
    params = SamplingParams(
        seed=7, repeat_penalty=1.2, ignore_eog=True, logit_bias=bias, grammar=grammar
    )
    with engine_on(model) as one, engine_on(model) as two:
        with one.sequence(params) as sequence:
            with pytest.raises(ArgumentError):
                sequence.snapshot()
            sequence.prompt([1, *range(20, 60)])
            drive(sequence, 3)
            data = sequence.snapshot()
            tokens, rest = sequence.tokens, drive(sequence, 8)
        with two.sequence() as copy:
            copy.prompt(PROMPT)
            copy.restore(data)
            assert copy.tokens == tokens
            assert (copy.params.seed, copy.params.logit_bias) == (7, bias)
            assert copy.params.grammar == grammar
            before = two.stats()
            assert drive(copy, 8) == rest
            after = two.stats()
            assert after.rows - before.rows == 8  # nothing was computed again
            with pytest.raises(StateError):
                copy.restore(data[:100])
            assert copy.tokens == tokens + rest
        check_idle(one)
        check_idle(two)
    with engine_on(model, type_k="f16", type_v="f16") as other, other.sequence() as copy:
        copy.restore(data)  # of another cache: computed again
        assert copy.tokens == tokens
        assert len(drive(copy, 4)) == 4


def test_the_next_turn_behind_a_snapshot_draws_as_the_original(model: Model) -> None:
    params = SamplingParams(temperature=1.5, seed=7, ignore_eog=True)
    with engine_on(model) as engine, engine.sequence(params) as seq, engine.sequence() as copy:
        for n in range(4):
            copy.prompt([1 + n])
        seq.prompt(PROMPT)
        drive(seq, 3)
        for _ in range(2):
            copy.restore(seq.snapshot())
            for one in (seq, copy):
                one.prompt([50, 60])
            assert drive(seq, 8) == drive(copy, 8)


def test_a_prompt_that_was_refused_moves_no_seed(model: Model) -> None:
    params = SamplingParams(temperature=1.5, seed=7, ignore_eog=True)
    with engine_on(model) as engine, engine.sequence(params) as one, engine.sequence(params) as two:
        one.prompt(PROMPT)
        with pytest.raises(RequestTooLong):
            two.prompt([1] * 3000)
        engine.drain()
        with pytest.raises(EngineDraining):
            two.prompt(PROMPT)
        engine.resume()
        two.prompt(PROMPT)
        assert drive(one, 8) == drive(two, 8)


@pytest.mark.parametrize("listen", [Stream.add_done_callback, Stream.on_prompt])
def test_a_callback_may_close_a_sequence_and_not_wait_for_it(
    model: Model, listen: Callable[[Stream, Callable[[object], None]], None]
) -> None:
    told: list[str] = []
    with engine_on(model) as engine:
        seq = engine.sequence(GREEDY)
        seq.prompt(PROMPT)

        def called(_: object) -> None:
            if not seq.closed:
                for ask in (seq.sample, lambda: seq.prompt([50]), seq.snapshot):
                    with pytest.raises(UnsupportedOperation) as refused:
                        ask()
                    told.append(str(refused.value))
                seq.close()

        with engine._core.state:  # it does not end before it has a callback
            stream = engine.submit(PROMPT, greedy())
            listen(stream, called)
        assert stream.result(60).finish_reason == "length"
        until(lambda: seq.closed)
    assert len(told) == 3
    assert "a callback can't wait" in told[0]


def test_a_prompt_callback_may_close_a_sequence_that_another_thread_is_in(model: Model) -> None:
    with engine_on(model) as engine:
        seq = engine.sequence(GREEDY)
        seq.prompt(PROMPT)
        told: list[str] = []

        def called(_: object) -> None:
            with pytest.raises(UnsupportedOperation) as refused:
                seq.prompt([50])
            told.append(str(refused.value))
            seq.close()

        with seq._lock:  # as in a call
            with engine._core.state:
                stream = engine.submit(PROMPT, greedy())
                stream.on_prompt(called)
            assert stream.result(60).finish_reason == "length"
        until(lambda: engine.stats().sequences == 0)
        assert seq.closed
    assert "a callback can't wait" in told[0]


def test_a_callback_samples_no_sequence_that_runs_alone(model: Model) -> None:
    alone, told = threading.Event(), threading.Event()

    def called(_: object) -> None:
        assert alone.wait(60)
        with pytest.raises(UnsupportedOperation):
            seq.sample()
        told.set()

    with engine_on(model) as engine, engine.sequence(GREEDY) as seq:
        seq.prompt(PROMPT)
        with engine._core.state:
            stream = engine.submit(PROMPT, greedy())
            stream.add_done_callback(called)
        stream.result(60)
        drive(seq, 4)
        alone.set()
        assert told.wait(60)


@pytest.mark.parametrize("kv_unified", [False, True])
def test_behind_a_prompt_that_was_cancelled_sampling_goes_on(
    model: Model, kv_unified: bool
) -> None:
    params = SamplingParams(temperature=1.5, seed=7, repeat_penalty=1.3, ignore_eog=True)
    with (
        engine_on(model, n_batch=16, kv_unified=kv_unified) as engine,
        engine.sequence(params) as one,
        engine.sequence(params) as two,
        ThreadPoolExecutor(1) as pool,
    ):
        for seq in (one, two):
            seq.prompt(PROMPT)
        assert drive(one, 3) == drive(two, 3)
        with held(engine, 2):
            rows = engine.stats().prefill_rows
            call = pool.submit(one.prompt, list(range(10, 100)))
            until(lambda: engine.stats().prefill_rows > rows)
            one.cancel()
            with pytest.raises(Cancelled):
                call.result(60)
        assert one.tokens == two.tokens
        copy = engine.sequence()
        copy.restore(one.snapshot())
        assert drive(one, 8) == drive(two, 8) == drive(copy, 8)
        for seq in (one, two):
            seq.prompt([50, 60])
        assert drive(one, 8) == drive(two, 8)
        copy.close()


def test_a_snapshot_without_memory_fails_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state_seq_get(*args: Any, **options: Any) -> bytes:
        raise MemoryError

    with engine_on(model) as engine, engine.sequence(GREEDY) as sequence:
        sequence.prompt(PROMPT)
        first = drive(sequence, 3)
        monkeypatch.setattr(engine._context, "state_seq_get", state_seq_get)
        with pytest.raises(MemoryError):
            sequence.snapshot()
        rest = drive(sequence, 3)
        assert first + rest == engine.submit(PROMPT, GREEDY).result(60).tokens[:6]


def test_preserved_tokens_are_text(embedded_model: Model) -> None:
    end = int(embedded_model.vocab.tokenize("<|im_start|>", parse_special=True)[-1])
    params = SamplingParams(temperature=0, logit_bias={end: 100.0}, preserved_tokens=[end])
    with engine_on(embedded_model) as engine, engine.sequence(params) as seq:
        seq.prompt("one two three")
        with seq.fork(replace(params, preserved_tokens=())) as hidden, engine.sequence() as copy:
            copy.restore(seq.snapshot())
            said = [one.sample() for one in (seq, copy, hidden)]
    assert [one.text for one in said] == ["<|im_start|>", "<|im_start|>", ""]
    assert {one.token for one in said} == {end}


def test_a_snapshot_goes_through_a_file(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "seq.state"
    with engine_on(model) as engine, engine.sequence(GREEDY) as sequence:
        sequence.prompt(PROMPT)
        first = drive(sequence, 3)
        sequence.save(path)
        with pytest.raises(StateError, match="can't write"):
            sequence.save(tmp_path / "nowhere" / "seq.state")
        rest = drive(sequence, 4)
    assert [file.name for file in tmp_path.iterdir()] == ["seq.state"]
    with engine_on(model, n_seq_max=2) as engine, engine.sequence() as other:
        other.load(path)
        assert other.tokens == PROMPT + first
        assert drive(other, 4) == rest
        path.write_bytes(path.read_bytes()[:-1])
        for wrong in (path, tmp_path / "none"):
            with pytest.raises(StateError):
                other.load(wrong)
        assert other.tokens == PROMPT + first + rest
    with (
        engine_on(loaded("qwen2")) as engine,
        engine.sequence() as other,
        pytest.raises(StateError),
    ):
        other.load(path)


def test_threads_share_their_decodes(model: Model) -> None:
    n, n_tokens = 4, 48
    barrier = threading.Barrier(n)

    def run(engine: Engine, i: int) -> list[int]:
        with engine.sequence(GREEDY) as sequence:
            sequence.prompt([1, 20 + i, 30])
            barrier.wait()
            tokens = drive(sequence, n_tokens)
            barrier.wait()  # none leaves before the others are done
            return tokens

    with engine_on(model, gather=Window(5.0)) as engine:  # so that none misses it
        alone = [
            engine.submit([1, 20 + i, 30], greedy(n_tokens)).result(60).tokens for i in range(n)
        ]
        before = engine.stats()
        with ThreadPoolExecutor(n) as threads:
            got = list(threads.map(lambda i: run(engine, i), range(n)))
        after = engine.stats()
        assert got == alone
        steps = {n_rows: after.fill[n_rows] - before.fill.get(n_rows, 0) for n_rows in after.fill}
        assert steps.get(n, 0) >= 1  # as many as the machine lets come in time
        check_idle(engine)


@contextmanager
def failing(engine: Engine, code: int) -> Iterator[None]:
    """Every decode computes its first row and fails."""
    compute = engine._stepper.compute

    def fail(*args: Any) -> Any:
        set_fault(engine._stepper, 1, code, 1)
        return compute(*args)

    setattr(engine._stepper, "compute", fail)  # noqa: B010
    try:
        yield
    finally:
        setattr(engine._stepper, "compute", compute)  # noqa: B010


def test_a_cancelled_call_has_not_happened(model: Model) -> None:
    with engine_on(model, n_batch=8, n_ubatch=8) as engine:
        with engine.sequence(GREEDY) as sequence, ThreadPoolExecutor(1) as thread:
            sequence.prompt(PROMPT)
            first = drive(sequence, 2)
            with held(engine):
                prompt = thread.submit(sequence.prompt, list(range(100, 400)))
                until(lambda: sequence.position >= 100)  # it has begun
                sequence.cancel()
                with pytest.raises(Cancelled):
                    prompt.result(30)
            assert sequence.tokens == PROMPT + first
            sequence.cancel()  # nothing to cancel
            rest = drive(sequence, 4)
        assert first + rest == engine.submit(PROMPT, GREEDY).result(60).tokens[:6]
        check_idle(engine)


def test_a_failed_decode_is_an_error_and_no_end(model: Model) -> None:
    with engine_on(model) as engine:
        expected = engine.submit(PROMPT, GREEDY).result(60).tokens
        with engine.sequence(GREEDY) as sequence:
            sequence.prompt(PROMPT)
            first = drive(sequence, 3)
            for code in (2, -3):
                with failing(engine, code), pytest.raises(DecodeError):
                    sequence.sample()
                assert sequence.tokens == PROMPT + first
            with failing(engine, -3), pytest.raises(DecodeError):
                sequence.prompt([60, 61, 62])
            assert sequence.tokens == PROMPT + first
            set_fault(engine._stepper, 1, -3)  # once is tried again
            assert first + drive(sequence, 9) == expected
        check_idle(engine)


def test_owners_take_turns_after_a_decode_that_found_no_cells(model: Model) -> None:
    """The one that was preempted comes back as soon as the other one is idle for too long. After
    that none waits for another."""
    with engine_on(model, patience=0.05) as engine:
        expected = engine.submit(PROMPT, GREEDY).result(60).tokens
        with engine.sequence(GREEDY) as first, engine.sequence(GREEDY) as second:
            first.prompt(PROMPT)
            second.prompt([1, 60, 61])
            engine._core.scheduler.drop_cached()
            with engine._core.state:
                set_fault(engine._stepper, 1, 1, 0)
            assert second.sample().token >= 0
            before = engine.stats().preemptions
            tokens = []
            for _ in range(6):
                tokens.append(first.sample().token)
                second.sample()
            assert tokens == expected[:6]
            assert engine.stats().preemptions <= before + 1


def test_a_token_that_can_not_be_chosen_is_an_error(engine: Engine) -> None:
    nothing = SamplingParams(logit_bias={token: -float("inf") for token in range(N_VOCAB)})
    with engine.sequence(nothing) as sequence:
        sequence.prompt(PROMPT)
        for _ in range(2):
            with pytest.raises(SamplingError):
                sequence.sample()
            assert sequence.position == 5
    check_idle(engine)


def test_bad_arguments_leave_it_as_it_was(engine: Engine) -> None:
    with pytest.raises(ArgumentError):
        engine.sequence(SamplingParams(stop=("x",)))
    with pytest.raises(GrammarError):
        engine.sequence(SamplingParams(grammar="root ::= (")).prompt(PROMPT)
    with engine.sequence(GREEDY) as sequence:
        with pytest.raises(ArgumentError):
            sequence.sample()
        for bad in ([], [N_VOCAB], [-1]):
            with pytest.raises(ArgumentError):
                sequence.prompt(bad)
        with pytest.raises(RequestTooLong):
            sequence.prompt([5] * 1100)
        sequence.prompt(PROMPT)
        with pytest.raises(RequestTooLong):
            sequence.prompt([5] * 1020)
        for n in (-1, 6, True, 1.5):
            with pytest.raises(ArgumentError):
                sequence.trim(n)  # type: ignore[arg-type]
        assert sequence.tokens == PROMPT
        sequence.trim(0)
        assert sequence.position == 0
        sequence.prompt(PROMPT)
        assert drive(sequence, 2) == engine.submit(PROMPT, GREEDY).result(60).tokens[:2]
    with pytest.raises(ClosedError):
        sequence.sample()
    sequence.close()
    check_idle(engine)


def test_a_full_sequence_says_so(model: Model) -> None:
    with engine_on(model, n_ctx=256, n_seq_max=1) as engine:
        with engine.sequence(GREEDY) as sequence:
            sequence.prompt([5] * (engine.n_ctx - 1))
            drive(sequence, 2)
            with pytest.raises(RequestTooLong):
                sequence.sample()
            sequence.trim(10)
            drive(sequence, 2)
        check_idle(engine)


def test_a_closed_engine_wakes_its_owners(model: Model) -> None:
    engine = engine_on(model, n_batch=8, n_ubatch=8)
    sequence = engine.sequence(GREEDY)
    with held(engine), ThreadPoolExecutor(1) as thread:
        prompt = thread.submit(sequence.prompt, [7] * 500)
        until(lambda: sequence.position >= 500)
        engine.close()
        with pytest.raises(EngineClosed):
            prompt.result(30)
    with pytest.raises(EngineClosed):
        sequence.prompt(PROMPT)
    sequence.close()
    with pytest.raises(EngineClosed):
        engine.sequence()


def test_a_forgotten_sequence_gives_its_cells_back(engine: Engine) -> None:
    sequence = engine.sequence(GREEDY)
    sequence.prompt(PROMPT)
    assert engine.stats().kv_used == 4
    del sequence
    gc.collect()
    engine.submit(PROMPT, GREEDY).result(60)
    check_idle(engine)


def test_a_grammar_begins_anew_with_each_prompt(embedded_model: Model) -> None:
    params = SamplingParams(grammar='root ::= "yes" | "no"')
    with engine_on(embedded_model) as engine, engine.sequence(params) as sequence:
        for _ in range(3):
            sequence.prompt("Hm? ")
            text = ""
            while not (sampled := sequence.sample()).end:
                text += sampled.text
            assert text in ("yes", "no")


OPS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["prompt", "sample", "trim", "cancel", "request"]),
        st.integers(1, 30),
    ),
    max_size=25,
)


@given(OPS)
@settings(max_examples=30)
def test_whatever_the_owners_do_each_gets_its_own(ops: list[tuple[int, str, int]]) -> None:
    """Three sequences on two slots and a request now and then: greedy tokens of each are those of
    a request with the same prefix, and in the end nothing is left over."""
    with engine_on(loaded("llama"), n_seq_max=2, n_ctx=256, patience=0.0) as engine:
        sequences = [engine.sequence(GREEDY) for _ in range(3)]
        known: list[list[int]] = [[], [], []]
        streams = []
        for which, what, n in ops:
            sequence, tokens = sequences[which], known[which]
            if what == "prompt" and len(tokens) + n < 60:
                part = [(7 * i + n) % N_VOCAB for i in range(n)]
                sequence.prompt(part)
                tokens += part
            elif what == "sample" and tokens:
                sampled = sequence.sample()
                assert [sampled.token] == engine.submit(tokens, greedy(1)).result(60).tokens
                tokens.append(sampled.token)
            elif what == "trim":
                sequence.trim(min(n, len(tokens)))
                del tokens[n:]
            elif what == "cancel":
                sequence.cancel()
            elif what == "request":
                streams.append(engine.submit([n, n + 1], GREEDY))
            assert sequence.tokens == tokens
        for stream in streams:
            assert len(stream.result(60).tokens) == 12
        for sequence in sequences:
            sequence.close()
        check_idle(engine)
