"""Lines that keep their orders say the same as sorting them would; tenants add up."""

import pickle
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.scheduler import ComposedPolicy, Limits, Plan, SequenceList, SequenceView
from pyllamabatch.scheduler.policies.fair import LeastServed
from pyllamabatch.scheduler.queue import MOST_ORDERS, SequenceQueue
from pyllamabatch.scheduler.running import Entry
from tests.support.scheduler_machine import Machine


def by_priority(seq: SequenceView) -> int:
    return -seq.priority


def by_prompt(seq: SequenceView) -> int:
    return seq.n_prompt


def tenant(seq: SequenceView) -> str:
    return seq.tenant


def ids(views: Any) -> list[int]:
    return [view.id for view in views]


def view_of(entry: Entry) -> SequenceView:
    return entry.view


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 2)), max_size=60))
def test_a_line_that_changes_is_the_line_that_it_is(changes: list[tuple[int, int, int]]) -> None:
    """Asked at each moment, or only now and then, `by` and `split` are those of a plain line."""
    line: SequenceQueue[Entry] = SequenceQueue(view_of)
    plain: list[SequenceView] = []
    for id, (what, n, kind) in enumerate(changes):
        view = SequenceView(id, 0.0, n + 1, priority=kind, tenant="abc"[kind])
        if what < 3 or not plain:
            first = what == 0
            line.join(id, Entry(view), first=first)
            plain.insert(0 if first else len(plain), view)
        elif what == 3:
            gone = plain.pop(n % len(plain))
            assert line.leave(gone.id) is not None
            assert line.leave(gone.id) is None
        else:
            place = n % len(plain)
            line.put(plain[place].id, priority=kind)
            plain[place] = line.ids[plain[place].id].view
            assert plain[place].priority == kind
        if what == 5:
            continue
        expected = SequenceList(plain)
        assert ids(line) == ids(expected)
        assert ids(reversed(line)) == ids(reversed(expected))
        assert ids(line.by(by_priority)) == ids(expected.by(by_priority))
        assert line.find(id) == expected.find(id)
        lines, expected_lines = line.split(tenant), expected.split(tenant)
        assert {name: ids(lines[name]) for name in lines} == {
            name: ids(expected_lines[name]) for name in expected_lines
        }
        assert len(lines) == len(expected_lines)
        if n % 3 == 0:
            assert ids(line.by(by_prompt)) == ids(expected.by(by_prompt))
            assert line.column("n_prompt").tolist() == expected.column("n_prompt").tolist()


def test_orders_that_are_made_on_the_spot_are_forgotten() -> None:
    line: SequenceQueue[Entry] = SequenceQueue(view_of)
    for id in range(5):
        line.join(id, Entry(SequenceView(id, 0.0, 9 - id)))
    for _ in range(3 * MOST_ORDERS):
        assert ids(line.by(lambda seq: seq.n_prompt)) == [4, 3, 2, 1, 0]
        assert len(line.split(lambda seq: seq.id)) == 5
    assert len(line._indexes) == MOST_ORDERS


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20), st.sampled_from("abc")), max_size=9)
)
def test_columns_and_tenants_are_those_of_the_sequences(
    requests: list[tuple[int, int, str]],
) -> None:
    least_served = LeastServed(prompt=1.0, generated=2.0)
    machine = Machine(Limits(16, 8, 3, 90, 90), ComposedPolicy(ended=least_served.ended))
    for id, (n_prompt, end, name) in enumerate(requests):
        target = None if id % 2 else 0.5 + id
        machine.add(id, n_prompt, 20, end, tenant=name, itl_target=target)
    columns = (
        *("id", "generated", "computed", "n_prompt", "turn", "max_tokens", "known"),
        by_prompt,
    )
    for _ in machine.steps():
        view = machine.scheduler.view(0.0)
        plain = SequenceList(view.running)
        rows = zip(*(view.running.column(name).tolist() for name in columns), strict=True)
        expected = zip(*(plain.column(name).tolist() for name in columns), strict=True)
        assert sorted(rows) == sorted(expected)
        assert view.running.itl_targets() == plain.itl_targets()
        served = dict.fromkeys((requests[id][2] for id in machine.first_rows), 0.0)
        for id in machine.first_rows:
            served[requests[id][2]] += requests[id][0] + 2 * machine.generated[id]
        assert least_served.counters(view) == served


def test_a_column_of_no_sequences_is_one_of_numbers() -> None:
    assert SequenceList().column("id").dtype == np.int64


def test_a_plan_may_go_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(Plan({1: 2}))) == Plan({1: 2})
