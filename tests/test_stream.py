"""Stream: reading from threads while another one pushes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyllamabatch.errors import KvCacheFull
from pyllamabatch.stream import Stream


def stream(**options: object) -> Stream:
    cancelled: list[Stream] = []
    made = Stream(1, 3, cancel=cancelled.append, **options)  # type: ignore[arg-type]
    made.cancelled = cancelled  # type: ignore[attr-defined]
    return made


def push(made: Stream, *pieces: bytes) -> bool:
    hit = False
    for i, piece in enumerate(pieces, len(made._tokens)):
        now = time.perf_counter()
        hit = made._push([100 + i], [piece], now, [-0.5], [{100 + i: -0.5}]) is not None
    return hit


def test_tokens_come_in_order_to_every_reader() -> None:
    made = stream()
    with ThreadPoolExecutor(4) as pool:
        readers = [
            pool.submit(lambda: [(t.index, t.token, t.text) for t in made]) for _ in range(3)
        ]
        result = pool.submit(made.result, 10)
        for i in range(50):
            push(made, b"%d," % i)
        made._finish("length")
        expected = [(i, 100 + i, f"{i},") for i in range(50)]
        assert [reader.result(10) for reader in readers] == [expected] * 3
    assert result.result().text == "".join(f"{i}," for i in range(50))
    assert [t.token for t in made] == list(range(100, 150))  # again, from the start
    assert result.result().n_generated == 50
    assert (result.result().ttft_s or 9) <= result.result().e2el_s


def test_held_back_text_arrives_with_its_tokens_at_the_end() -> None:
    made = stream(stops=("END",))
    assert not push(made, b"a", b"E", b"N")
    assert made.text == "a"
    made._finish("length")
    assert [(t.token, t.text) for t in made] == [(100, "a"), (101, "E"), (102, "N")]
    assert made.result().text == "aEN"


def test_a_stop_string_ends_the_text_and_keeps_the_tokens() -> None:
    made = stream(stops=("END",))
    assert push(made, b"a", b"E", b"N", b"D!")
    made._finish("stop")
    result = made.result()
    assert (result.text, result.stop, result.tokens) == ("a", "END", [100, 101, 102, 103])
    assert list(made.text_stream()) == ["a"]


def test_log_probabilities_only_when_asked_for() -> None:
    made = stream()
    push(made, b"a")
    made._finish("length")
    assert made.result().logprobs is None
    assert made.result().top_logprobs is None
    assert next(iter(made)).logprob is None
    made = stream(logprobs=0)
    push(made, b"a")
    made._finish("length")
    assert (made.result().logprobs, made.result().top_logprobs) == ([-0.5], None)
    made = stream(logprobs=2)
    push(made, b"a")
    made._finish("length")
    assert made.result().top_logprobs == [{100: -0.5}]
    assert next(iter(made)).top_logprobs == {100: -0.5}


def test_an_error_is_raised_after_the_tokens_that_came_before_it() -> None:
    made = stream()
    push(made, b"a")
    made._finish("error", error=KvCacheFull(1))
    seen: list[str] = []
    with pytest.raises(KvCacheFull):
        seen.extend(token.text for token in made)
    tokens = iter(made)
    assert next(tokens).text == "a"
    with pytest.raises(KvCacheFull):
        next(tokens)
    with pytest.raises(KvCacheFull):
        made.result()
    result = made.wait()
    assert (result.finish_reason, result.text) == ("error", "a")
    assert isinstance(result.error, KvCacheFull)


def test_waiting_ends_by_itself() -> None:
    made = stream()
    with pytest.raises(TimeoutError, match="request 1 is not done"):
        made.result(timeout=0.01)
    assert not made.done
    threading.Timer(0.02, made._finish, ["cancelled"]).start()
    assert made.result(timeout=10).finish_reason == "cancelled"
    assert made.result().ttft_s is None


def test_the_first_end_counts() -> None:
    made = stream()
    made._finish("stop", 7)
    made._finish("cancelled")
    assert made.result().finish_reason == "stop"
    assert made.result().stop == 7
    assert not made.cancel()
    assert made.cancelled == []  # type: ignore[attr-defined]


def test_callbacks_are_called_once_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    made = stream()
    called: list[str] = []
    made.add_done_callback(lambda s: called.append(f"first {s.done}"))
    made.add_done_callback(lambda s: 1 // 0)
    made.add_done_callback(lambda s: called.append("third"))
    made._finish("stop")
    made.add_done_callback(lambda s: called.append("late"))
    assert called == ["first True", "third", "late"]
    assert "a done callback of request 1 failed" in caplog.text


def test_text_can_be_read_at_any_time() -> None:
    made = stream()
    assert made.text == ""
    push(made, b"ab")
    assert (made.text, made.tokens) == ("ab", [100])
    assert repr(made) == "<Stream 1: open, 1 tokens>"
