"""Every decode of a run fails in turn, with every code, once or several times in a row: what can be
helped gets what it gets alone, and no request ends that was not in a step that failed."""

from collections import Counter

import pytest

from pyllamabatch.errors import (
    DecodeAborted,
    DecodeError,
    FatalDecodeError,
    InvalidBatch,
    KvCacheFull,
)
from pyllamabatch.kv import Sharing
from pyllamabatch.scheduler import Limits
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.engine_fakes import Rig

KINDS: dict[int, type[DecodeError]] = {
    1: KvCacheFull, 2: DecodeAborted, -1: InvalidBatch, -2: FatalDecodeError, -3: FatalDecodeError,
    -1019: FatalDecodeError,
}  # fmt: skip
RESTARTS = 2

MACHINES: dict[str, tuple[Limits, Sharing]] = {
    "shared cells": (
        Limits(n_batch=8, n_ubatch=8, n_seq_max=3, n_cells=48, n_cells_seq=48),
        Sharing(copy_part=True, copy_whole=True, trim=True, n_cached=2),
    ),
    "streams": (
        Limits(n_batch=8, n_ubatch=8, n_seq_max=3, n_cells=96, n_cells_seq=32, unified=False),
        Sharing(trim=True),
    ),
    "recurrent": (
        Limits(n_batch=8, n_ubatch=8, n_seq_max=3, n_cells=96, n_cells_seq=32, unified=False),
        Sharing(copy_whole=True),
    ),
}


def run(
    machine: str, faults: dict[int, int], max_restarts: int = RESTARTS, n_steps_max: int = 3
) -> tuple[Rig, dict[int, set[int]]]:
    """Five requests on three slots; which of them were in each step that failed."""
    limits, sharing = MACHINES[machine]
    hit: dict[int, set[int]] = {}

    def fault(step: int) -> int | None:
        if step in faults:
            slot_table, rows = rig.core.table, rig.machine.rows.seq[: rig.machine.n_now]
            occupants = [slot_table.at[slot] for slot in set(rows.tolist())]
            hit[step] = {occupant.id for occupant in occupants if occupant is not None}
        return faults.get(step)

    rig = Rig(
        limits, fault, n_steps_max=n_steps_max, sharing=sharing,
        swap="swap" if machine == "shared cells" else "recompute", max_restarts=max_restarts,
    )  # fmt: skip
    for i in range(5):
        prompt = [7 * (i // 2) + k for k in range(1, 4 + 2 * i)]
        rig.submit(prompt, SamplingParams(temperature=0, max_tokens=4 + i))
    rig.run()
    return rig, hit


def check_survivors(rig: Rig, code: int) -> set[int]:
    """Requests that have not failed have what they get alone; those that have, which are returned,
    the first tokens of it and an error of their own."""
    rig.check_end()
    errors = {
        request.id: request.stream.wait(0).error
        for request in rig.requests
        if request.stream.wait(0).finish_reason not in ("stop", "length")
    }
    assert all(type(error) is KINDS[code] for error in errors.values())
    assert len(set(map(id, errors.values()))) == len(errors)
    return set(errors)


def restarts(hit: dict[int, set[int]]) -> tuple[set[int], int]:
    """Which requests fail, and how many fresh contexts it takes, where all failures come in a row:
    each second one costs those that are in it one of their RESTARTS."""
    paid: Counter[int] = Counter()
    failed: set[int] = set()
    n = 0
    for step in sorted(hit)[1::2]:
        again = {id for id in hit[step] if paid[id] < RESTARTS}
        failed |= hit[step] - again
        paid.update(again)
        n += bool(again)
    return failed, n


@pytest.mark.parametrize("n_times", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("code", KINDS)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_decode_of_a_run(machine: str, code: int, n_times: int) -> None:
    n_decodes = run(machine, {})[0].machine.n_steps
    assert n_decodes > 12
    n_failed = 0
    for first in range(1, n_decodes + 1):
        for n_steps_max in (1, 100):
            faults = dict.fromkeys(range(first, first + n_times), code)
            rig, hit = run(machine, faults, n_steps_max=n_steps_max)
            failed = check_survivors(rig, code)
            n_failed += len(failed)
            assert failed <= set().union(*hit.values())
            assert rig.machine.n_renewed == rig.core.recovery.n_restarts
            if code == 1:  # one that is not alone is helped where another one is preempted
                assert not failed or any(len(occupants) == 1 for occupants in hit.values())
                assert n_times > 1 or not failed
            elif code == 2:  # one retry
                assert bool(failed) == any(k in hit and k + 1 in hit for k in hit)
            elif code == -1:  # the rows are wrong: no retry
                assert failed == set().union(*hit.values())
            else:
                assert (failed, rig.machine.n_renewed) == restarts(hit)
    assert n_failed > 0 or (code == 1 and n_times == 1) or (code != -1 and n_times < 6)


@pytest.mark.parametrize("code", [-2, -1019])
@pytest.mark.parametrize("machine", MACHINES)
def test_without_restarts_the_step_that_fails_twice_ends_its_requests(
    machine: str, code: int
) -> None:
    n_decodes = run(machine, {}, 0)[0].machine.n_steps
    for first in range(1, n_decodes + 1):
        rig, hit = run(machine, {first: code, first + 1: code}, 0)
        assert check_survivors(rig, code) == hit.get(first + 1, set())
        assert rig.machine.n_renewed == 0


@pytest.mark.parametrize("codes", [(1, -2, -2), (-2, 1, -2), (2, -2), (-2, -1), (-3, -3, 1, 1, 1)])
@pytest.mark.parametrize("machine", MACHINES)
def test_different_codes_one_after_the_other(machine: str, codes: tuple[int, ...]) -> None:
    n_decodes = run(machine, {})[0].machine.n_steps
    for first in range(1, n_decodes + 1):
        rig, hit = run(machine, {first + i: code for i, code in enumerate(codes)})
        rig.check_solo()
        reasons = {request.id: request.stream.wait(0).finish_reason for request in rig.requests}
        failed = {id for id, reason in reasons.items() if reason == "error"}
        assert failed <= set().union(*hit.values())
        rig.check()
