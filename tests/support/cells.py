"""A memory in plain Python: what KV operations make of it, and what a real one would refuse."""

from collections import Counter
from collections.abc import Iterable, Sequence

from pyllamabatch.kv import KvOperation, Sharing

Cell = tuple[int, object]
"""A token and its cell."""


class Cells:
    """Of every slot the cells. `sharing`: what the memory can do. `unified`: slots share cells;
    else each has its own, and copies wait for the next step. `saved`: tokens of saved states, by
    sequence id. `copying`: slots of copies that wait."""

    def __init__(self, sharing: Sharing, unified: bool) -> None:
        self.sharing, self.unified = sharing, unified
        self.slots: dict[int, list[Cell]] = {}
        self.saved: dict[int, list[int]] = {}
        self.copying: set[int] = set()

    def held(self, slot: int) -> int:
        return len(self.slots.get(slot, ()))

    def tokens(self, slot: int) -> list[int]:
        return [token for token, _ in self.slots.get(slot, ())]

    def write(self, slot: int, tokens: Sequence[int]) -> None:
        """Fresh cells with these tokens, behind those that the slot has."""
        cells = self.slots.setdefault(slot, [])
        cells += [(int(token), object()) for token in tokens]

    def uses(self, slots: Iterable[int]) -> Counter[object]:
        """Of each cell of these slots, how many have it."""
        return Counter(cell for slot in slots for _, cell in self.slots[slot])

    @property
    def used(self) -> int:
        """Cells in use, shared ones once."""
        return len({cell for cells in self.slots.values() for _, cell in cells})

    def carry_out(self, operation: KvOperation, known: Sequence[int] = ()) -> None:
        """`known`: the tokens of the sequence whose state is stored."""
        can, slot, n = self.sharing, operation.slot, operation.n
        held = self.slots.get(slot, [])
        if operation.kind == "remove":
            self.slots.pop(slot, None)
        elif operation.kind == "trim":
            assert can.trim
            assert 0 < n < len(held)
            assert not can.window or can.tries or len(held) <= can.window
            self.slots[slot] = held[:n]
        elif operation.kind == "cut":
            self.slots[slot] = held[:n]
        elif operation.kind == "copy":
            source = self.slots[operation.source]
            assert not held
            assert can.copy_whole if operation.whole else can.copy_part
            assert n == len(source) or (not operation.whole and n < len(source))
            if self.unified:
                self.slots[slot] = source[:n]
            else:
                self.write(slot, self.tokens(operation.source)[:n])
                self.copying |= set() if can.at_once else {operation.source, slot}
        elif operation.kind == "save":
            assert n == len(held)
            self.saved[operation.id] = self.tokens(slot)
        elif operation.kind == "load":
            assert not held
            assert slot not in self.copying
            self.write(slot, self.saved.pop(operation.id))
            assert len(self.slots[slot]) == n
        elif operation.kind == "store":
            self.saved[operation.id] = list(known[:n])
        else:
            del self.saved[operation.id]
