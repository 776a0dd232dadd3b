"""The rules that every plan keeps, by name. A plan that breaks one changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sized
from math import inf
from typing import NoReturn, Protocol

from ..errors import PlanError
from .view import Limits, Plan, Tokens

RULES: dict[str, str] = {
    "plan": "a policy answers with a Plan",
    "known-sequence": "tokens and preempt name sequences that run or wait",
    "whole-tokens": "a sequence advances by a whole number of tokens, at least 1",
    "within-remaining": "no sequence advances by more than its remaining tokens",
    "rows": "the rows of a step are at most n_batch",
    "slots": "at most n_seq_max sequences run at once",
    "cells": "the rows of a step, and what newcomers start from, fit into the free KV cells, those "
    "of the preempted included",
    "preempt-running": "only a running sequence can be preempted, and only once",
    "preempt-or-run": "a sequence that is preempted does not run in the same step",
    "repeat": "a plan stands for a whole number of steps, at least 1, and for more than one only "
    "if all of its sequences decode and nobody is preempted",
    "progress": "a step has rows, or preempts, or says until when there is nothing to do, unless "
    "one of the running sequences rests",
    "wake": "a plan that waits is empty, and waits until a finite time later than now",
}


def broken(rule: str, detail: str) -> NoReturn:
    raise PlanError(rule, f"{RULES[rule]}: {detail}")


class _Ids(Container[int], Sized, Protocol): ...


def check_plan(
    plan: Plan,
    *,
    now: float,
    limits: Limits,
    decoding: Mapping[int, int],
    running: _Ids,
    waiting: _Ids,
    remaining: Callable[[int], int],
    taken: Callable[[int], int],
    freed: Callable[[int], int],
    n_free: int,
    n_idle: int = 0,
) -> Mapping[int, int]:
    """Raise PlanError for the first rule that `plan` breaks; whom it advances otherwise than by
    decoding, in its order.

    `decoding`, `running`, `waiting`: the ids that decode, run (decoding or not) and wait.
    `remaining`: the tokens that a sequence may advance by. `taken`: free cells that a waiting one
    takes before that. `freed`: those that a running one gives up. `n_free`: free KV cells.
    `resting`: how many of the running have nothing to compute. A step of pure decoding is checked
    without a loop in Python, one of `Tokens` without any over those who decode.
    """
    if not isinstance(plan, Plan):
        broken("plan", f"{plan!r}")
    tokens = plan.tokens
    if isinstance(tokens, Tokens) and tokens.decoding is decoding:
        without = set(tokens.without)
        others = tokens.others
        for id in [*without, *others]:
            if (id in without) != (id in decoding):
                broken("known-sequence", f"{id!r} decodes, or does not, otherwise than shown")
        n_decodes = len(decoding) - len(without)
        _check_whole(others)
    else:
        _check_whole(tokens)
        others = {id: n for id, n in tokens.items() if id not in decoding}
        n_decodes = len(tokens) - len(others)
        if sum(tokens.values()) - sum(others.values()) != n_decodes:
            id = next(id for id, n in tokens.items() if n != 1 and id in decoding)
            broken("within-remaining", f"sequence {id} by {tokens[id]} of 1")
    n_rows, n_new, n_taken = n_decodes, 0, 0
    for id, n in others.items():
        if id not in running:
            if id not in waiting:
                broken("known-sequence", f"tokens for {id!r}")
            n_new += 1
            n_taken += taken(id)
        limit = remaining(id)
        if n > limit:
            broken("within-remaining", f"sequence {id} by {n} of {limit}")
        n_rows += n
    n_freed = 0
    for id in plan.preempt:
        if id not in running:
            rule = "preempt-running" if id in waiting else "known-sequence"
            broken(rule, f"preempt {id!r}")
        if id in tokens:
            broken("preempt-or-run", f"sequence {id}")
        n_freed += freed(id)
    if len(set(plan.preempt)) != len(plan.preempt):
        broken("preempt-running", f"named twice in {plan.preempt}")
    if n_rows > limits.n_batch:
        broken("rows", f"{n_rows} of {limits.n_batch}")
    n_running = len(running) + n_new - len(plan.preempt)
    if n_running > limits.n_seq_max:
        broken("slots", f"{n_running} of {limits.n_seq_max}")
    if n_rows + n_taken > n_free + n_freed:
        detail = f"{n_rows} rows, {n_taken} to start from, {n_free} free and {n_freed} given up"
        broken("cells", detail)
    if type(plan.repeat) is not int or plan.repeat < 1:
        broken("repeat", f"{plan.repeat!r} steps")
    if plan.repeat > 1 and (others or plan.preempt or not tokens):
        broken("repeat", f"{plan.repeat} steps of {len(others)} that do not decode")
    if plan.wake is not None:
        if tokens or plan.preempt:
            broken("wake", f"{len(tokens)} sequences advance, {len(plan.preempt)} are preempted")
        if not now < plan.wake < inf:
            broken("wake", f"until {plan.wake!r}, and it is {now!r}")
    elif not tokens and not plan.preempt and not n_idle:
        broken("progress", f"an empty plan, {len(running)} run and {len(waiting)} wait")
    return others


def _check_whole(tokens: Mapping[int, int]) -> None:
    values = tokens.values()
    if tokens and (set(map(type, values)) != {int} or min(values) < 1):
        id, n = next((id, n) for id, n in tokens.items() if type(n) is not int or n < 1)
        broken("whole-tokens", f"sequence {id} by {n!r}")
