"""What sequences of one context can take over from each other, and the words for it: hits, keys and
KV operations."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .grid import last_end
from .radix_tree import Tokens

# Shorter prefixes are computed again: that costs less than a step's wait for them.
MIN_PREFIX = 16


@dataclass(frozen=True, slots=True)
class Sharing:
    """What sequences of one context can take over from each other.

    - copy_part: any prefix of a sequence can be copied to an empty slot.
    - copy_whole: all of a sequence can.
    - at_once: a copy between streams is made at once, and not with the next step.
    - trim: the end of a sequence can be cut off.
    - window: a sequence longer than this is only good as a whole, for the older cells of its
      sliding window are given to others; 0: no such limit. tries: they may be there all the same
      (the window has as many cells as the rest), so a part is worth a try.
    - n_cached: slots beyond those that may run at once, for what is cached.
    - grid: prefixes end where chunks do, with this step (`pyllamabatch.kv.grid`); 1: anywhere."""

    copy_part: bool = False
    copy_whole: bool = False
    at_once: bool = False
    trim: bool = False
    window: int = 0
    tries: bool = False
    n_cached: int = 0
    grid: int = 1

    @property
    def any(self) -> bool:
        """Whether there is any way to use what another sequence has computed."""
        return self.copy_part or self.copy_whole or self.trim

    @property
    def fills(self) -> bool:
        """Whether rows that no sequence reads can be taken out again, which fill a prompt up."""
        return self.trim and (self.tries or not self.window)

    @property
    def at_checkpoints(self) -> bool:
        """Only whole states can be taken over, so copies have to be made at the right positions."""
        return self.copy_whole and not self.trim and not self.copy_part and self.n_cached > 0

    def whole(self, n: int) -> int:
        """Of the first `n` tokens those that can be a prefix."""
        return last_end(n, self.grid)

    def of_known(self, n: int) -> int:
        """How many of `n` known tokens can be a prefix of another sequence. With a grid the last
        one is not computed as the others are."""
        return n if self.grid == 1 else self.whole(max(0, n - 1))


class KvOperation(NamedTuple):
    """A change of the memory.

    - remove: all of `slot`. trim: all of `slot` but its first `n` positions; cut: the same, of the
      running sequence `id`.
    - copy: the first `n` positions of `source` (all that it holds, if `whole`) to the empty `slot`.
    - pool: all that is held goes, and the streams of cells become one pool. streams: the same, and
      the pool becomes streams again.
    - save: the state of `slot` to the host, for sequence `id`. load: the saved state of `id` to the
      empty `slot`, which uses it up. store: a state that sequence `id` brings, to the saved ones.
      discard: the saved state of `id`.

    `id`: the sequence that starts from this, 0 when none does."""

    kind: Literal[
        "remove", "trim", "cut", "copy", "pool", "streams", "save", "load", "store", "discard"
    ]
    slot: int
    source: int = -1
    n: int = 0
    whole: bool = False
    id: int = 0


class Hit(NamedTuple):
    """The first `n` tokens of a sequence are in `slot`. `cells`: those of them that count as free
    until they are used."""

    slot: int = -1
    n: int = 0
    cells: int = 0


NO_HIT = Hit()


Key = tuple[Hashable, bytes]


def key_of(tokens: Tokens, space: Hashable) -> Key:
    """Sequences of different keys can't start from each other."""
    return space, tokens[:MIN_PREFIX].tobytes()
