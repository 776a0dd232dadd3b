"""ChunkSink: texts of streams to the sockets of their connections, in one native call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from ..engine.followers import Follower, SinkTable, TextSink
from ..engine.stream import Column
from ..raw import ffi, lib

if TYPE_CHECKING:
    from ..step.ring_reader import Page
    from .protocol import HttpProtocol


class ChunkSink(TextSink):
    """Chunks of one response: `before`, a text, `after`. A text goes to the socket itself, as long
    as that takes it; what is left goes to the transport, and what comes behind it."""

    __slots__ = ("after", "before", "protocol", "transport")

    def __init__(self, protocol: HttpProtocol, before: bytes, after: bytes) -> None:
        self.protocol, self.transport = protocol, protocol.transport
        self.before, self.after = ffi.from_buffer(before), ffi.from_buffer(after)

    @classmethod
    def table(cls) -> ChunkTable:
        return ChunkTable()

    @property
    def is_free(self) -> bool:
        return not (self.transport.is_closing() or self.transport.get_write_buffer_size())

    def chunk(self, text: bytes) -> bytes:
        before, after = ffi.buffer(self.before)[:], ffi.buffer(self.after)[:]
        return b"%x\r\n%b%b%b\r\n" % (len(before) + len(text) + len(after), before, text, after)

    def write(self, rest: bytes) -> Awaitable[None] | None:
        if self.transport.is_closing():
            return None
        self.transport.write(rest)
        flow = self.protocol.flow
        return flow.drain() if flow.write_paused else None

    def when_lost(self, call: Callable[[], None] | None) -> None:
        self.protocol.when_lost = call


class ChunkTable(SinkTable):
    """Rows of plb_sink, and their followers."""

    def __init__(self) -> None:
        self._of: list[Follower] = []
        self._page: Page | None = None  # that of the last one
        self._rows = ffi.new("plb_sink[]", 0)
        self._gaps, self._n_gaps = ffi.new("plb_gap[]", 0), ffi.new("int32_t *")
        self._left = ffi.new("int32_t[]", 0)

    def _grow(self) -> None:
        n, rows = max(16, 2 * len(self._of)), self._rows
        self._rows = ffi.new("plb_sink[]", n)
        ffi.memmove(self._rows, rows, ffi.sizeof(rows))
        self._gaps, self._left = ffi.new("plb_gap[]", n), ffi.new("int32_t[]", n)

    def put(self, one: Follower, column: Column) -> None:
        sink, texts = one.sink, one.texts
        assert isinstance(sink, ChunkSink)
        assert texts is not None
        socket = sink.transport.get_extra_info("socket").fileno()
        one.row = len(self._of)
        if one.row == len(self._rows):
            self._grow()
        self._of.append(one)
        row = self._rows[one.row]
        one.column = column
        self._page, row.slot, row.at, row.turn = column
        row.page, row.texts, row.socket = column.page.struct, texts.struct, socket
        row.before, row.n_before = sink.before, len(sink.before)
        row.after, row.n_after = sink.after, len(sink.after)
        row.since = one.took_s

    def drop(self, one: Follower) -> None:
        assert one.column is not None
        row, last = self._rows[one.row], self._of.pop()
        one.index += row.at - one.column.at
        one.took_s = row.since
        if last is not one:
            self._rows[one.row] = self._rows[last.row]
            self._of[one.row] = last
            last.row = one.row
        one.column = None

    def send(self, now: float, observe: Callable[[float, int], None]) -> list[Follower]:
        page = self._page
        if page is None or not self._of:
            return []
        shown = page.shown_array  # before `turns`, which is looked at behind it
        n_left = lib.plb_send_tokens(
            page.struct, ffi.from_buffer("int32_t[]", shown),
            ffi.from_buffer("int32_t[]", page.turns), self._rows, len(self._of), now,
            self._gaps, self._n_gaps, self._left,
        )  # fmt: skip
        for gap in self._gaps[0 : self._n_gaps[0]]:
            observe(now - gap.since, gap.n)
        return [self._of[i] for i in self._left[0:n_left]]

    def rest(self, one: Follower) -> bytes | None:
        row, texts, sink = self._rows[one.row], one.texts, one.sink
        assert isinstance(sink, ChunkSink)
        assert texts is not None
        assert one.column is not None
        token = one.column.page.token
        if row.n_sent == lib.PLB_SINK_UNKNOWN:
            texts.learn(int(token[row.slot, row.at]))
        if row.n_sent < 0:
            return None
        return sink.chunk(texts[int(token[row.slot, row.at - 1])])[row.n_sent :]
