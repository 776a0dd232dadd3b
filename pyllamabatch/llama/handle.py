"""Who frees what, when: a native object lives as long as anything refers to its pointer."""

import math
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import ClosedError, ContextBusy
from pyllamabatch.raw import ffi, lib


def owned(ptr: Any, *needs: object, free: Callable[[Any], object] = id) -> Any:
    """`ptr` as cdata that keeps `needs`, until nothing refers to it any more: then it is freed,
    and what it needed is let go after it.

    free: a C function, so that no line of Python runs when garbage is collected: a
    KeyboardInterrupt raised there would be lost. `id`: nothing is to be freed."""
    end = partial(free)
    end.needs = needs  # type: ignore[attr-defined]
    return ffi.gc(ptr, end)


def here(free: Callable[[int, Any], object]) -> Callable[[Any], object]:
    """`free` of what is made now: a C function that frees nothing in a forked child."""
    return partial(free, lib.plb_process())


def view(pointer: Any, dtype: npt.DTypeLike, shape: tuple[int, ...], owner: object) -> Any:
    """A NumPy view on native memory that keeps the memory's owner."""
    kind = np.dtype(dtype)
    size = kind.itemsize * math.prod(shape)
    return np.ndarray(shape, kind, ffi.buffer(owned(pointer, owner), size))


class Held:
    """A native pointer, until it is let go."""

    def __init__(self, ptr: Any, what: str) -> None:
        self.now = ptr  # None from `let_go` on
        self.what = what

    @property
    def ptr(self) -> Any:
        """The pointer. Raises `ClosedError`."""
        ptr = self.now
        if ptr is None:
            raise ClosedError(f"{self.what} is closed")
        return ptr

    def let_go(self) -> None:
        self.now = None


class Exclusive(Held, AbstractContextManager[None]):
    """The native context of now, for one thread at a time.

    Entering costs well under a microsecond, and a thread may enter again. Raises `ContextBusy`
    when another thread is inside, `ClosedError` when the context is closed."""

    def __init__(self, ptr: Any) -> None:
        super().__init__(ptr, "the context")
        self.lock = threading.RLock()

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            raise ContextBusy("another thread is inside this context; use one thread, or a lock")
        if self.now is None:
            self.lock.release()
            raise ClosedError("the context is closed")

    def __exit__(self, *error: object) -> None:
        self.lock.release()


T = TypeVar("T", bound="Owner")


class Owner:
    """A Python object with a native one: `close` it, or use it in a `with` block."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._close = weakref.finalize(self, held.let_go)  # at the interpreter's end, too

    @property
    def ptr(self) -> Any:
        """The native pointer. Raises `ClosedError` when closed."""
        return self._held.ptr

    @property
    def closed(self) -> bool:
        return self._held.now is None

    def close(self) -> None:
        """Close it; its memory is freed when nothing uses it any more. Closing twice is fine."""
        self._close()

    def __enter__(self: T) -> T:
        self.ptr  # noqa: B018 (raises when closed)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
