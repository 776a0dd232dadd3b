"""ChunkSink: texts of streams to the sockets of their connections, in one native call."""

from __future__ import annotations

import os
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

    __slots__ = ("after", "before", "flow", "socket", "transport")

    def __init__(self, protocol: HttpProtocol, before: bytes, after: bytes) -> None:
        self.transport = transport = protocol.transport
        self.flow = protocol.flow
        # one of its own: the transport closes its, and the next connection may get that
        closed = transport.is_closing()
        self.socket = -1 if closed else os.dup(transport.get_extra_info("socket").fileno())
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
        return self.flow.drain() if self.flow.write_paused else None

    def close(self) -> None:
        if self.socket >= 0:
            os.close(self.socket)
            self.socket = -1


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
        one.row = len(self._of)
        if one.row == len(self._rows):
            self._grow()
        self._of.append(one)
        row = self._rows[one.row]
        self._page, row.slot, row.at, row.turn = column
        one.page = column.page  # as long as the row points to it
        row.page, row.texts, row.socket = column.page.struct, texts.struct, sink.socket
        row.before, row.n_before = sink.before, len(sink.before)
        row.after, row.n_after = sink.after, len(sink.after)
        row.since = one.took_s
        one.index -= row.at  # see `drop`

    def drop(self, one: Follower) -> None:
        row, last = self._rows[one.row], self._of.pop()
        one.index += row.at
        one.took_s = row.since
        if last is not one:
            self._rows[one.row] = self._rows[last.row]
            self._of[one.row] = last
            last.row = one.row
        one.row, one.page = -1, None

    def send(
        self, now: float, observe: Callable[[float, int], None]
    ) -> list[tuple[Follower, bytes | None]]:
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
        return [(self._of[i], self._rest(i, page)) for i in self._left[0:n_left]]

    def _rest(self, i: int, page: Page) -> bytes | None:
        row, texts, sink = self._rows[i], self._of[i].texts, self._of[i].sink
        assert isinstance(sink, ChunkSink)
        assert texts is not None
        if row.n_sent == lib.PLB_SINK_UNKNOWN:
            texts.learn(int(page.token[row.slot, row.at]))
        if row.n_sent < 0:
            return None
        return sink.chunk(texts[int(page.token[row.slot, row.at - 1])])[row.n_sent :]
