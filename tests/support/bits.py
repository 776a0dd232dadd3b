"""The logits that an engine samples from, to the last bit."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyllamabatch.engine.engine import Engine
from pyllamabatch.raw import ffi, lib

Bits = dict[int, bytes]
"""Of one sequence: a digest of all logits by the position that they were sampled from."""


@contextmanager
def recorded(engine: Engine) -> Iterator[dict[int, Bits]]:
    """What each sequence samples from meanwhile, by its id. Native calls make one step each. For
    batch-invariant engines: the row of a slot is its number."""
    stepper: Any = engine._core._stepper
    compute, core = stepper.compute, engine._core
    n_bytes = 4 * engine.model.n_vocab
    found: dict[int, Bits] = {}

    def computed(slots: Any, n_steps: int, n_before: int = 0, n_pad: int = 0) -> Any:
        # A request does not know its last tokens yet, an interactive sequence has not all counted.
        of_slot = [(core.table.in_slot(s), s) for s in slots.tolist()]
        rows = [
            (of.id, core.scheduler.computed(s) if of.budget is not None else len(of.tokens) - 1, s)
            for of, s in of_slot
        ]
        run = compute(slots, 1, n_before, n_pad)
        assert run.code or not rows or n_pad > slots[-1]
        each = (stepper._info.n_rows + stepper._info.n_filled) // n_pad if run.n_drafted else 1
        for id, position, slot in rows if run.code == 0 else ():
            n_taken = int(stepper.drafts.n_taken[slot]) if run.n_drafted else 1
            for j in range(n_taken):
                row = lib.llama_get_logits_ith(engine._context.ptr, slot * each + j)
                digest = hashlib.blake2b(ffi.buffer(row, n_bytes), digest_size=8).digest()
                found.setdefault(id, {})[position + j] = digest
        return run

    stepper.compute = computed
    try:
        yield found
    finally:
        stepper.compute = compute
