"""Who frees what, when: a native object lives until its owner and all its users are done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from pyllamabatch.errors import ClosedError

T = TypeVar("T", bound="Owner")


class Owner:
    """Something with a native pointer and a `close`: a context manager that closes at its end."""

    @property
    def ptr(self) -> Any:
        """The native pointer. ClosedError when it is gone."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self: T) -> T:
        self.ptr  # noqa: B018 (raises when closed)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Handle:
    """A native pointer with a count of users.

    The Python object that made it holds the first use; whatever needs the pointer to stay valid
    (a context needs its model) takes another. The last `release` frees it.
    """

    __slots__ = ("_free", "_lock", "_parents", "_ptr", "_uses")

    def __init__(self, ptr: Any, free: Callable[[Any], None], *parents: Handle) -> None:
        self._ptr = ptr
        self._free = free
        self._parents = tuple(parent.retain() for parent in parents)
        self._lock = threading.Lock()
        self._uses = 1

    @property
    def ptr(self) -> Any:
        return self._ptr

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
            ptr, self._ptr = self._ptr, None
        self._free(ptr)
        for parent in self._parents:
            parent.release()
