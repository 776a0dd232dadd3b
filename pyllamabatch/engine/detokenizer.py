"""Pieces of tokens to text that may be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..llama.vocab import Utf8Decoder
from ..raw import ffi


class Pieces(dict[int, bytes]):
    """The bytes of each token, looked up once per engine: `fetch` gives those of several."""

    def __init__(self, fetch: Callable[[list[int]], list[bytes]]) -> None:
        super().__init__()
        self._fetch = fetch
        self._harmless: dict[tuple[str, ...], Harmless] = {}
        self._preserving: dict[tuple[int, ...], Pieces] = {}
        self._texts: dict[Callable[[str], bytes], Texts] = {}

    def of(self, tokens: list[int]) -> list[bytes]:
        """Those of each of these tokens; what is not known yet is fetched in one go."""
        try:
            return [*map(self.__getitem__, tokens)]
        except KeyError:
            missing = [token for token in set(tokens) if token not in self]
            self.update(zip(missing, self._fetch(missing), strict=True))
            return [*map(self.__getitem__, tokens)]

    def preserving(self, tokens: tuple[int, ...], piece: Callable[[int], bytes]) -> Pieces:
        """These pieces, but those of `tokens` are as `piece` gives them."""
        found = self._preserving.get(tokens)
        if found is None:
            found = Pieces(self._fetch)
            found.update((token, piece(token)) for token in tokens)
            if len(self._preserving) < 64:
                self._preserving[tokens] = found
        return found

    def texts(self, encode: Callable[[str], bytes]) -> Texts:
        """The texts of tokens that are whole characters, as `encode` gives them."""
        found = self._texts.get(encode)
        if found is None:
            found = Texts(self, encode)
            if len(self._texts) < 64:
                self._texts[encode] = found
        return found

    def harmless(self, stops: tuple[str, ...]) -> Harmless:
        """The tokens in which none of these stop strings can begin, as far as they are known."""
        found = self._harmless.get(stops)
        if found is None:
            found = Harmless(self, stops)
            if len(self._harmless) < 64:  # sets of stop strings that requests share
                self._harmless[stops] = found
        return found


class Texts(dict[int, bytes]):
    """By token, for native code: `struct` is a plb_texts of those that were learnt."""

    def __init__(self, pieces: Pieces, encode: Callable[[str], bytes]) -> None:
        super().__init__()
        self._pieces = pieces
        self._encode = encode
        self.struct = ffi.new("plb_texts *")
        self._entries = ffi.new("plb_text[]", 0)

    def learn(self, token: int) -> None:
        """Of what is not whole characters there is no text: that depends on its neighbours."""
        if (n := self.struct.n) <= token:
            more = ffi.new("plb_text[]", max(2 * n, token + 1))
            ffi.memmove(more, self._entries, ffi.sizeof(self._entries))
            self._entries = self.struct.of = more
            self.struct.n = len(more)
        entry = self._entries[token]
        (piece,) = self._pieces.of([token])
        try:
            self[token] = text = self._encode(piece.decode())
        except UnicodeDecodeError:
            entry.n = -1
        else:
            entry.data, entry.n = ffi.from_buffer(text), len(text)


class Harmless:
    """Tokens in which none of some stop strings can begin, because the first byte of none is in
    their pieces: as long as nothing is held back, their text need not be searched."""

    __slots__ = ("_firsts", "_pieces", "_tokens")

    def __init__(self, pieces: Pieces, stops: tuple[str, ...]) -> None:
        self._pieces = pieces
        self._firsts = {stop.encode("utf-8", "surrogatepass")[:1] for stop in stops}
        if any("\ufffd" in stop for stop in stops):
            self._firsts.add(b"")  # any bytes that are not UTF-8 may become one
        self._tokens: set[int] = set()

    def covers(self, tokens: list[int]) -> bool:
        known = self._tokens
        if known.issuperset(tokens):
            return True
        every = True
        for token, piece in zip(tokens, self._pieces.of(tokens), strict=True):
            if any(first in piece for first in self._firsts):
                every = False
            else:
                known.add(token)
        return every


class TextFeed:
    """Takes pieces one by one and says how many tokens' text is decided.

    A token's text is decided once it ends on a whole UTF-8 character and no stop string can begin
    in it any more. `parts[i]` is the text of token i: a character whose bytes come from several
    tokens belongs to the last of them, bytes that are not UTF-8 become U+FFFD. The text ends
    before the stop string that is complete first (of several complete at the same place, the one
    that began first); how the text was cut into tokens makes no difference. `min_tokens`: in the
    text of so many tokens, the first ones, stop strings are not looked for."""

    __slots__ = (
        "_decode", "_held", "_min_tokens", "_partial", "_state", "_stops", "n_decided", "parts",
        "stop",
    )  # fmt: skip

    def __init__(self, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        decoder = Utf8Decoder("replace")
        self._decode = decoder.decode
        self._state = decoder.getstate
        self._stops = tuple(stops)
        self._min_tokens = min_tokens
        self._partial = False  # the text ends within a character
        self._held = ""  # the end of the text, in which a stop string may have begun
        self.parts: list[str] = []
        self.n_decided = 0
        self.stop: str | None = None

    def feed(self, piece: bytes) -> bool:
        """The next token's piece; True when a stop string is complete, which ends the text."""
        part = self._text(piece)
        self.parts.append(part)
        if self._stops and part and len(self.parts) > self._min_tokens:
            self._held += part
            if self._find_stop():
                return True
            self._held = self._held[len(self._held) - self._n_undecided() :]
        if not self._partial:
            self._decide()
        return False

    def _text(self, piece: bytes) -> str:
        if not self._partial:
            try:
                return piece.decode()  # whole characters, as nearly always
            except UnicodeDecodeError:
                pass
        part = self._decode(piece)
        self._partial = bool(self._state()[0])
        return part

    def finish(self) -> None:
        """No more tokens: what was held back is text after all, but for the bytes of a character
        that was not completed."""
        self.n_decided = len(self.parts)

    @property
    def holds(self) -> bool:
        """Whether a stop string may have begun at the end of the text, which may be within a
        character."""
        return self._partial or bool(self._held)

    @property
    def text(self) -> str:
        """All text that is decided."""
        return "".join(self.parts[: self.n_decided])

    def _find_stop(self) -> bool:
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = self._held.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        if best is None:
            return False
        _, start, self.stop = best
        self._cut(len(self._held) - start)
        self.n_decided = len(self.parts)
        return True

    def _cut(self, n: int) -> None:
        """Take the last `n` characters away; none of them has been decided."""
        parts = self.parts
        i = len(parts) - 1
        while n > 0:
            part = parts[i]
            parts[i] = part[: max(0, len(part) - n)]
            n -= len(part)
            i -= 1

    def _n_undecided(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        held = self._held
        longest = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(held)), longest, -1):
                if held.endswith(stop[:n]):
                    longest = n
                    break
        return longest

    def _decide(self) -> None:
        """Every token before the held end of the text is decided."""
        n, end = len(self._held), len(self.parts)
        while n > 0:
            end -= 1
            n -= len(self.parts[end])
        self.n_decided = end
