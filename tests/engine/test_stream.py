"""Stream: reading from threads while another one pushes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.engine.detokenizer import Pieces, TextFeed
from pyllamabatch.engine.results import PromptProgress
from pyllamabatch.engine.stream import Host, Stream
from pyllamabatch.errors import KvCacheFull
from pyllamabatch.llama.model import Model
from pyllamabatch.step.ring_reader import Page
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.engines import engine_on, greedy

N_STEPS = 64
PIECES: dict[int, bytes] = {}  # by token, of the test that runs


class Told(Stream):
    """With what its host was told."""

    cancelled: list[int]
    watched: set[Stream]


def stream(**options: object) -> Told:
    """A stream at the start of a page, in column 1."""
    PIECES.clear()
    cancelled: list[int] = []
    watched: set[Stream] = set()
    params = SamplingParams(**options)  # type: ignore[arg-type]
    pieces = Pieces(lambda tokens: [PIECES[token] for token in tokens])
    made = Told(1, 3, params, pieces, Host(cancelled.append, watched.add), 0.0)
    made.cancelled, made.watched = cancelled, watched
    made._begin(Page(2, N_STEPS, 3), 1)
    return made


def push(made: Told, *pieces: bytes) -> bool:
    """One token more for each piece, delivered as the output processor does."""
    page = made._page
    assert page is not None
    for piece in pieces:
        at, step = int(page.n_tokens[1]), page.struct.n_steps
        token = 100 + at
        PIECES[token] = piece
        page.token[1, at], page.step[1, at] = token, step
        if page.top_token is not None and page.top_logprob is not None:
            page.logprob[1, at], page.n_top[1, at] = -0.5, 1  # type: ignore[index]
            page.top_token[1, at], page.top_logprob[1, at] = token, -0.5
        page.steps.table[step]["t_start_ns"] = time.perf_counter_ns()
        page.n_tokens[1], page.struct.n_steps = at + 1, step + 1
    page.show()
    stopped = made._scan() if made._harmless is not None else False
    if made in made.watched:
        made.watched.discard(made)
        made._wake()
    return stopped


def test_a_stream_is_not_watched_behind_its_end() -> None:
    """Its end waits: it takes the stream out of what is watched, for good."""
    free: list[bool] = []
    with ThreadPoolExecutor(1) as other:
        host = Host(print, lambda s: free.append(other.submit(s._lock.acquire, False).result()))
        made = Stream(1, 3, SamplingParams(), Pieces(lambda tokens: []), host, 0.0)
        assert (made.text, made.tokens) == ("", [])
        made._finish("length")
        assert (made.text, made.tokens) == ("", [])
    assert free == [False, False]


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


@pytest.mark.parametrize(("end", "n_dropped"), [(None, 2), (7, 3)])
def test_a_stop_string_ends_the_text_and_keeps_the_tokens(end: int | None, n_dropped: int) -> None:
    """An end token behind it counts no more than others."""
    made = stream(stop=("END",))
    assert push(made, b"a", b"E", b"N", b"D!")
    push(made, b"x", b"y")
    counted: list[tuple[str, int]] = []
    made._finish("stop" if end else "length", end, count=lambda *given: counted.append(given))
    assert counted == [("stop", n_dropped)]
    result = made.result()
    assert (result.text, result.stop, result.tokens) == ("a", "END", [100, 101, 102, 103])
    assert list(made.text_stream()) == ["a"]


def test_log_probabilities_only_when_asked_for() -> None:
    for asked, found, top in ((None, None, None), (0, [-0.5], None), (2, [-0.5], [{100: -0.5}])):
        made = stream(logprobs=asked)
        push(made, b"a")
        made._finish("length")
        assert (made.result().logprobs, made.result().top_logprobs) == (found, top)
        token = next(iter(made))
        assert (token.logprob, token.top_logprobs) == (found and found[0], top and top[0])


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
    assert made.cancelled == []


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


def test_a_prompt_callback_that_fails_is_not_called_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, seen = stream(), list[int]()

    def once(progress: PromptProgress) -> None:
        seen.append(progress.n_computed)
        raise ValueError(progress)

    made.on_prompt(once)
    made._admitted(0)
    made._prompt_computed(1)
    assert seen == [0]
    made.on_prompt(once)  # by the caller's own thread
    assert seen == [0, 0]
    assert caplog.text.count("a prompt callback of request 1 failed") == 2


def test_a_prompt_callback_may_ask_the_stream(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    with engine_on(model, n_batch=16) as engine:
        with engine._core.state:
            made = engine.submit([1, *range(10, 40)], greedy(3))
            made.on_prompt(lambda p: seen.append((p.n_computed, made.times().n_prompt)))
        assert made.result(60).finish_reason == "length"
    assert seen == [(0, 31), (16, 31), (31, 31)]


def test_text_can_be_read_at_any_time() -> None:
    made = stream()
    assert made.text == ""
    push(made, b"ab")
    assert (made.text, made.tokens) == ("ab", [100])
    assert repr(made) == "<Stream 1: open, 1 tokens>"


def test_a_reader_finds_the_stop_string_before_the_output_thread() -> None:
    made = stream(stop=("b",))
    page = made._page
    assert page is not None
    PIECES.update({100: b"a", 101: b"b", 102: b"c"})
    page.token[1, :3], page.step[1, :3], page.n_tokens[1] = (100, 101, 102), 0, 3
    page.show()
    assert made.text == "a"
    assert made.tokens == [100, 101]
    assert made._scan()


@pytest.mark.parametrize("looks", [False, True])
def test_a_stop_string_begins_with_a_character_of_several_tokens(looks: bool) -> None:
    made = stream(stop=("€b",))
    for piece in (b"a", b"\xe2", b"\x82", b"\xac", b"b", b"c"):
        push(made, piece)
        assert not looks or made.text in ("", "a")
    made._finish("length")
    result = made.result()
    assert (result.text, result.stop, result.n_generated) == ("a", "€b", 5)


@settings(max_examples=400)
@given(
    st.lists(
        st.binary(max_size=3)
        | st.text("abE€", max_size=3).map(str.encode)
        | st.sampled_from([b"\xe2", b"\x82", b"\xac", b"\x82\xac"]),  # of "€"
        max_size=30,
    ),
    st.lists(st.text("abE€\ufffd", min_size=1, max_size=3), min_size=1, max_size=3),
    st.sets(st.integers(0, 30)),
)
def test_stop_strings_are_found_as_if_every_piece_had_been_searched(
    pieces: list[bytes], stops: list[str], looks: set[int]
) -> None:
    feed = TextFeed(stops)
    n = next((i for i, piece in enumerate(pieces, 1) if feed.feed(piece)), len(pieces))
    feed.finish()
    made = stream(stop=tuple(stops))
    for i, piece in enumerate(pieces):
        push(made, piece)
        if i in looks:
            assert feed.text.startswith(made.text)
    made._finish("length")
    result = made.result()
    assert (result.text, result.stop, result.n_generated) == (feed.text, feed.stop, n)
    assert [token.text for token in made] == feed.parts
    assert result.finish_reason == ("length" if feed.stop is None else "stop")


def test_pages_turn_and_slots_change() -> None:
    """A preempted request goes on in another column of another page."""
    made = stream()
    push(made, b"a", b"b")
    made._turn_to(None)
    assert made.text == "ab"
    page = Page(2, N_STEPS)
    page.token[0, :2], page.step[0, :2], page.n_tokens[0] = (7, 8), 0, 1
    page.show()
    made._begin(page, 0)
    assert made.tokens == [100, 101]  # what is there already is another stream's
    PIECES[8] = b"c"
    page.n_tokens[0] = 2
    page.show()
    made._turn_to(Page(2, N_STEPS))
    assert (made.tokens, made.text) == ([100, 101, 8], "abc")
    made._finish("length")
    assert made.result().n_generated == 3


def test_a_stream_has_no_dict() -> None:
    """It would be slower for every token: CPython shares the keys of 30 attributes at most."""
    made = Stream(1, 3, SamplingParams(), Pieces(lambda tokens: []), Host(print, print), 0.0)
    assert not hasattr(made, "__dict__")


def test_half_a_character_is_a_token_already() -> None:
    made = stream()
    with ThreadPoolExecutor(2) as threads:
        one, two = (threads.submit(made.wait_for_tokens, n) for n in (1, 2))
        text = iter(made.text_stream())
        push(made, "é".encode()[:1])
        while not one.done():  # it may have come to wait behind the push
            push(made)
        assert one.result()
        assert not two.done()
        push(made, "é".encode()[1:])
        assert next(text) == "é"
        made._finish("stop")
        assert two.result()
    assert not made.wait_for_tokens(3)
