"""Who frees what, when: a native object lives until its owner and all its users are done."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from pyllamabatch.errors import ClosedError, ContextBusy


class Handle:
    """A native pointer with a count of users.

    The Python object that made it holds the first use. Whatever needs the pointer to stay valid (a
    context needs its model) takes another. The last `release` frees it.
    """

    __slots__ = ("_free", "_lock", "_parents", "_uses", "ptr")

    def __init__(self, ptr: Any, free: Callable[[Any], None], *parents: Handle) -> None:
        self.ptr = ptr
        self._free = free
        self._parents = tuple(parent.retain() for parent in parents)
        self._lock = threading.Lock()
        self._uses = 1

    def retain(self) -> Handle:
        with self._lock:
            if self._uses == 0:
                raise ClosedError("the native object is gone")
            self._uses += 1
        return self

    def release(self) -> None:
        with self._lock:
            self._uses -= 1
            if self._uses:
                return
            ptr, self.ptr = self.ptr, None
        self._free(ptr)
        for parent in self._parents:
            parent.release()


class Exclusive(AbstractContextManager[None]):
    """The native context of now, for one thread at a time.

    Entering costs well under a microsecond, and a thread may enter again. Raises `ContextBusy`
    when another thread is inside, `ClosedError` when the context is closed.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle: Handle = handle
        self.lock = threading.RLock()
        self.closed = False

    @property
    def ptr(self) -> Any:
        """`struct llama_context *`. Raises `ClosedError`."""
        if self.closed:
            raise ClosedError("the context is closed")
        return self.handle.ptr

    def release(self) -> None:
        if not self.closed:
            self.closed = True
            self.handle.release()

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            raise ContextBusy("another thread is inside this context; use one thread, or a lock")
        if self.closed:
            self.lock.release()
            raise ClosedError("the context is closed")

    def __exit__(self, *error: object) -> None:
        self.lock.release()


T = TypeVar("T", bound="Owner")


class Owner:
    """A Python object with a native one: `close` it, or use it in a `with` block."""

    def __init__(self, held: Handle | Exclusive, what: str) -> None:
        self._owned = held
        self._what = what
        self._close = weakref.finalize(self, held.release)

    @property
    def ptr(self) -> Any:
        """The native pointer. Raises `ClosedError` when closed."""
        if not self._close.alive:
            raise ClosedError(f"{self._what} is closed")
        return self._owned.ptr

    @property
    def closed(self) -> bool:
        return not self._close.alive

    def close(self) -> None:
        """Close it; its memory is freed when nothing uses it any more. Closing twice is fine."""
        self._close()

    def __enter__(self: T) -> T:
        self.ptr  # noqa: B018 (raises when closed)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
