"""The rules that every plan keeps, by name. A plan that breaks one changes nothing."""

from collections.abc import Callable, Iterable, Mapping, Set
from itertools import chain
from math import inf
from numbers import Real
from operator import index
from typing import Any, NamedTuple, NoReturn

from ..errors import PlanError
from .view import Plan, StepView

RULES: dict[str, str] = {
    "plan": "a policy answers with a Plan",
    "known-sequence": "tokens and preempt name sequences that run or wait",
    "whole-tokens": "a sequence advances by a whole number of tokens, at least 1",
    "within-remaining": "no sequence advances by more than its remaining tokens",
    "decode-all": "sit_out is for a plan with decode_all, whose tokens name no sequence that "
    "decodes, and sit_out none that does not",
    "rows": "the rows of a step are at most n_batch",
    "slots": "at most n_seq_max sequences run at once",
    "cells": "the rows of a step, and what newcomers start from, fit into the free KV cells, those "
    "of the preempted included",
    "preempt-running": "only a running sequence can be preempted, and only once",
    "preempt-or-run": "a sequence that is preempted does not run in the same step",
    "repeat": "a plan stands for a whole number of steps, at least 1, and for more than one only "
    "if all of its sequences decode and none is preempted",
    "drafts": "drafts are for sequences that decode in a plan of decoding alone and are not "
    "interactive: whole numbers of tokens from 1 to n_draft_max, for whose rows there are outputs "
    "and free KV cells",
    "progress": "a step has rows, or preempts, or says until when there is nothing to do, unless "
    "one of the running sequences is idle",
    "wake": "a plan that waits is empty, and waits until a finite time later than now",
}


class CheckedRows(NamedTuple):
    """A checked plan: how many sequences decode, which of `StepView.decoding` do not, and by how
    many tokens the others advance."""

    n_decodes: int
    out: Set[int]
    others: dict[int, int]


def check_plan(plan: Plan, view: StepView) -> tuple[Plan, CheckedRows]:
    """`plan`, tidied up, and its rows. PlanError for the first rule that it breaks.
    With `decode_all` there is no loop over the sequences that decode."""
    if not isinstance(plan, Plan):
        _broken("plan", f"{plan!r}")
    plan = _tidy(plan)
    rows = _rows(plan, view)
    n_rows, n_new, n_taken, n_freed = rows.n_decodes, 0, 0, 0
    if rows.others:
        n_rows += sum(rows.others.values())
        n_new, n_taken = _check_others(rows.others, view)
    if plan.preempt:
        n_freed = _check_preempted(plan, view)
    limits = view.limits
    if n_rows > limits.n_batch:
        _broken("rows", f"{n_rows} of {limits.n_batch}")
    n_running = len(view.running) + n_new - len(plan.preempt)
    if n_running > limits.n_seq_max:
        _broken("slots", f"{n_running} of {limits.n_seq_max}")
    free = view.kv.free
    if n_rows + n_taken > free + n_freed:
        detail = f"{n_rows} rows, {n_taken} to start from, {free} free and {n_freed} given up"
        _broken("cells", detail)
    _check_time(plan, view, rows, n_rows)
    if plan.drafts:
        _check_drafts(plan, view, rows, n_rows)
    return plan, rows


def whole(value: Any) -> Any:
    """A whole number (NumPy's too) as an int; anything else as it is."""
    try:
        return value if isinstance(value, bool) else index(value)
    except TypeError:
        return value


_FIELDS: tuple[tuple[str, type, Callable[[Any], Any]], ...] = (
    ("tokens", Mapping, dict),
    ("preempt", Iterable, tuple),
    ("sit_out", Iterable, frozenset),
    ("reasons", Mapping, dict),
    ("drafts", Mapping, dict),
)


def _tidy(plan: Plan) -> Plan:
    """Nothing for a None, whatever holds ids as a plan holds them, whole numbers as ints."""
    for name, kind, make in _FIELDS:
        value = getattr(plan, name)
        if type(value) is make:
            continue
        if not (value is None or isinstance(value, kind)):
            _broken("plan", f"{name}={value!r} is no {kind.__name__}")
        plan = plan._replace(**{name: make(() if value is None else value)})
    tokens, preempt, drafts = plan.tokens, plan.preempt, plan.drafts
    numbers = chain(tokens, tokens.values(), preempt, drafts, drafts.values(), (plan.repeat,))
    if set(map(type, numbers)) == {int}:
        return plan
    return plan._replace(
        tokens={whole(id): whole(n) for id, n in tokens.items()},
        preempt=tuple(map(whole, preempt)),
        drafts={whole(id): whole(n) for id, n in drafts.items()},
        repeat=whole(plan.repeat),
    )


def _rows(plan: Plan, view: StepView) -> CheckedRows:
    tokens, decoding = plan.tokens, view.decoding
    if plan.decode_all and not (tokens or plan.sit_out or plan.preempt):
        return CheckedRows(len(decoding), plan.sit_out, {})
    _check_whole(tokens)
    others = {id: n for id, n in tokens.items() if id not in decoding}
    n_named = len(tokens) - len(others)
    if plan.decode_all:
        if n_named:
            _broken("decode-all", f"tokens for {[id for id in tokens if id in decoding]}")
        if not plan.sit_out <= decoding:
            _broken("decode-all", f"{[*plan.sit_out - decoding]} do not decode")
        out: Set[int] = plan.sit_out | {id for id in plan.preempt if id in decoding}
        return CheckedRows(len(decoding) - len(out), out, others)
    if plan.sit_out:
        _broken("decode-all", f"{[*plan.sit_out]} sit out")
    for id in tokens.keys() & decoding if n_named else ():
        if tokens[id] != 1:
            _broken("within-remaining", f"sequence {id} by {tokens[id]} of 1")
    if n_named in (0, len(decoding)):
        return CheckedRows(n_named, frozenset() if n_named else decoding, others)
    return CheckedRows(n_named, decoding - tokens.keys(), others)


def _check_whole(tokens: Mapping[int, int]) -> None:
    values = tokens.values()
    if tokens and (set(map(type, values)) != {int} or min(values) < 1):
        id, n = next((id, n) for id, n in tokens.items() if type(n) is not int or n < 1)
        _broken("whole-tokens", f"sequence {id} by {n!r}")


def _check_others(others: Mapping[int, int], view: StepView) -> tuple[int, int]:
    """How many of those that do not decode are admitted, and the free cells that they start
    from."""
    n_new = n_taken = 0
    for id, n in others.items():
        seq = view.running.find(id)
        if seq is None:
            seq = view.waiting.find(id)
            if seq is None:
                _broken("known-sequence", f"tokens for {id!r}")
            n_new += 1
            n_taken += seq.prefix.cells
        if n > seq.remaining:
            _broken("within-remaining", f"sequence {id} by {n} of {seq.remaining}")
    return n_new, n_taken


def _check_preempted(plan: Plan, view: StepView) -> int:
    """Cells that they give up."""
    for id in plan.preempt:
        if view.running.find(id) is None:
            waits = view.waiting.find(id) is not None
            _broken("preempt-running" if waits else "known-sequence", f"preempt {id!r}")
        if id in plan.tokens:
            _broken("preempt-or-run", f"sequence {id}")
    if len(set(plan.preempt)) != len(plan.preempt):
        _broken("preempt-running", f"named twice in {plan.preempt}")
    return view.kv.freed_by(*plan.preempt)


def _check_time(plan: Plan, view: StepView, rows: CheckedRows, n_rows: int) -> None:
    if type(plan.repeat) is not int or plan.repeat < 1:
        _broken("repeat", f"{plan.repeat!r} steps")
    if plan.repeat > 1 and (rows.others or plan.preempt or not n_rows):
        _broken("repeat", f"{plan.repeat} steps of {len(rows.others)} that do not decode")
    if plan.wake is not None:
        if n_rows or plan.preempt:
            _broken("wake", f"{n_rows} rows, {len(plan.preempt)} sequences are preempted")
        if not (isinstance(plan.wake, Real) and view.now < plan.wake < inf):
            _broken("wake", f"until {plan.wake!r}, and it is {view.now!r}")
    elif not n_rows and not plan.preempt:
        n_running, n_waiting = len(view.running), len(view.waiting)
        if n_running == len(view.decoding) + len(view.prefilling):
            _broken("progress", f"an empty plan, {n_running} run and {n_waiting} wait")


def _check_drafts(plan: Plan, view: StepView, rows: CheckedRows, n_rows: int) -> None:
    limits = view.limits
    if rows.others or plan.preempt:
        _broken("drafts", f"{len(rows.others)} sequences do not decode")
    for id, n in plan.drafts.items():
        seq = view.running.find(id)
        if id not in view.decoding or id in rows.out or seq is None or seq.goal is not None:
            _broken("drafts", f"for sequence {id!r}")
        if type(n) is not int or not 1 <= n <= limits.n_draft_max:
            _broken("drafts", f"{n!r} of {limits.n_draft_max} for sequence {id}")
    n_all = n_rows + sum(plan.drafts.values())
    if n_all > min(limits.n_batch, limits.n_outputs or limits.n_batch, view.kv.free):
        _broken("drafts", f"{n_all} rows, {limits.n_outputs} outputs, {view.kv.free} cells")


def _broken(rule: str, detail: str) -> NoReturn:
    raise PlanError(rule, f"{RULES[rule]}: {detail}")
