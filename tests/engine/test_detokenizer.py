"""TextFeed: stop strings and UTF-8, however the text is cut into pieces."""

import codecs
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pyllamabatch.engine.detokenizer import Pieces, TextFeed


def run(pieces: list[bytes], stops: tuple[str, ...] = ()) -> tuple[TextFeed, list[str]]:
    feed, shown = TextFeed(stops), []
    for piece in pieces:
        ended = feed.feed(piece)
        shown.append(feed.text)
        if ended:
            break
    feed.finish()
    return feed, shown


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[i:j] for i, j in pairwise(at)]


def test_nothing_is_held_back_without_a_reason() -> None:
    feed, shown = run([b"one", b" two", b"", b" three"])
    assert shown == ["one", "one two", "one two", "one two three"]
    assert feed.parts == ["one", " two", "", " three"]


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    euro = "€".encode()
    feed, shown = run([b"a" + euro[:1], euro[1:2], euro[2:] + b"b"])
    assert shown == ["", "", "a€b"]
    assert feed.parts == ["a", "", "€b"]


def test_broken_bytes_do_not_hold_up_the_text() -> None:
    feed, shown = run([b"a", b"\xff", b"b", b"\xe2\x82"])
    assert shown == ["a", "a\ufffd", "a\ufffdb", "a\ufffdb"]
    assert feed.text == "a\ufffdb"  # without the unfinished character at the end


def test_a_stop_string_across_pieces_is_never_shown() -> None:
    feed, shown = run([b"go E", b"N", b"D now"], ("END",))
    assert shown == ["", "", "go "]
    assert (feed.text, feed.stop) == ("go ", "END")
    assert feed.parts == ["go ", "", ""]


def test_a_stop_string_that_does_not_come_true_is_shown() -> None:
    feed, shown = run([b"E", b"N", b"E", b"N", b"!"], ("END",))
    assert shown == ["", "", "EN", "EN", "ENEN!"]
    assert feed.stop is None
    feed, shown = run([b"x", b"EN"], ("END",))
    assert shown == ["x", "x"]
    assert feed.text == "xEN"


def test_the_stop_that_is_complete_first_wins() -> None:
    assert run([b"abcd"], ("abcd", "bc"))[0].text == "a"
    assert run([b"a", b"b", b"c", b"d"], ("abcd", "bc"))[0].text == "a"
    feed, _ = run([b"xabc"], ("bc", "abc"))
    assert (feed.text, feed.stop) == ("x", "abc")  # the same end: the one that began first


words = st.text(alphabet="ab€\n", max_size=20)
stop_lists = st.lists(st.text(alphabet="ab€\n", min_size=1, max_size=4), max_size=3)


@given(words, stop_lists, st.lists(st.integers(0, 60), max_size=30))
def test_however_it_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    whole, _ = run([text.encode()], tuple(stops))
    feed, shown = run(split(text.encode(), cuts), tuple(stops))
    assert (feed.text, feed.stop) == (whole.text, whole.stop)
    assert all(feed.text.startswith(part) for part in shown)  # nothing shown is ever taken back
    assert shown == sorted(shown, key=len)
    if feed.stop is None:
        assert feed.text == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(feed.text + feed.stop)
        # What had been shown before the end could not have begun a stop string.
        assert not any(stop in feed.text for stop in stops)
    assert "".join(feed.parts) == feed.text


def whole_characters(data: bytes) -> str:
    """Without the bytes of a last character that is not complete."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


@given(st.binary(max_size=20), st.lists(st.integers(0, 60), max_size=30))
def test_any_bytes_become_text(data: bytes, cuts: list[int]) -> None:
    feed, _ = run(split(data, cuts))
    assert feed.text == whole_characters(data)


def test_pieces_are_fetched_once_and_together() -> None:
    asked: list[list[int]] = []

    def fetch(tokens: list[int]) -> list[bytes]:
        asked.append(sorted(tokens))
        return [b"%d" % token for token in tokens]

    pieces = Pieces(fetch)
    assert pieces.of([7, 9, 7, 8]) == [b"7", b"9", b"7", b"8"]
    assert pieces.of([8]) == [b"8"]
    assert pieces.of([9, 1]) == [b"9", b"1"]
    assert pieces.of([]) == []
    assert asked == [[7, 8, 9], [1]]


def test_the_first_tokens_are_not_searched() -> None:
    feed = TextFeed(["ab"], 3)
    pieces = [b"ab", b"a", b"b a", b"b", b"a", b"bc"]
    assert [feed.feed(piece) for piece in pieces] == [False] * 5 + [True]
    assert feed.text == "abab ab"
    assert feed.stop == "ab"
