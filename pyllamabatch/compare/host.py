"""`python -m pyllamabatch.compare.host`: one arm in a process of its own, told what to do by the
comparison. So its memory can be read, and what ends it ends nothing else.

Lines of JSON on the standard input: first the setup `{"arm", "sampler", "case", "verbose"}`, then a
job each. On the standard output `{"ready": facts}`, then an outcome each; or `{"error": "why"}`.
"""

from __future__ import annotations

import json
from typing import Any

from pyllamabatch.compare.case import Case
from pyllamabatch.compare.child import lines_of_parent, log_to_stderr, tell_parent
from pyllamabatch.compare.inside import Contexts, Inside, Shared
from pyllamabatch.compare.job import Job
from pyllamabatch.compare.with_engine import WithEngine
from pyllamabatch.llama.model import Model
from pyllamabatch.report import facts

PROBE = "probe"  # no arm: what the rows say of build and model


def opened(arm: str, sampler: str, model: Model, case: Case) -> Inside:
    if arm == "engine":
        return WithEngine(model, case)
    return (Contexts if arm == "contexts" else Shared)(model, case, sampler)


def main() -> None:
    lines = lines_of_parent()
    setup: dict[str, Any] = json.loads(next(lines))
    if setup["verbose"]:
        log_to_stderr()
    case = Case.from_json(setup["case"])
    try:
        if setup["arm"] == PROBE:
            with Model(case.model.path, n_gpu_layers=case.n_gpu_layers, no_alloc=True) as model:
                tell_parent(json.dumps({"ready": facts.build("") | facts.about(model)}))
            return
        model = Model(case.model.path, n_gpu_layers=case.n_gpu_layers)
        arm = opened(setup["arm"], setup["sampler"], model, case)
    except Exception as error:
        tell_parent(failure(error))
        return
    tell_parent(json.dumps({"ready": {}}))
    for line in lines:
        tell_parent(outcome(arm, Job.from_json(line)))


def outcome(arm: Inside, job: Job) -> str:
    try:
        return arm.run(job).to_json()
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> str:
    """The answer that says why there is no other."""
    return json.dumps({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
