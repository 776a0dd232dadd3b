"""The process that an engine, or an embedder, was made in. A forked child has none of its threads,
and its locks may be held for ever there."""

import os

from ..errors import EngineClosed


class Process:
    """This process."""

    __slots__ = ("_id",)

    def __init__(self) -> None:
        self._id = os.getpid()

    @property
    def is_here(self) -> bool:
        """False in a forked child."""
        return os.getpid() == self._id

    def check(self) -> None:
        """EngineClosed in a forked child."""
        if not self.is_here:
            message = "this process was forked from that of the engine or embedder: make one in it"
            raise EngineClosed(message)
