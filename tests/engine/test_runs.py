"""Several steps in one call: what happens in the middle of a run comes out as if it had happened
between two steps."""

from itertools import count
from typing import Any

import pytest

from pyllamabatch.engine.stats import stats_of
from pyllamabatch.errors import SamplingError
from pyllamabatch.scheduler import Limits, Plan, StepView, sarathi
from tests.support.engine_fakes import EOG, Rig, solo
from tests.support.engines import greedy

LIMITS = Limits(n_batch=64, n_ubatch=64, n_seq_max=4, n_cells=256, n_cells_seq=256)
PROMPTS = [[10 * i + 1, 2, 3] for i in range(4)]


def rig_of(**options: object) -> Rig:
    return Rig(LIMITS, n_steps_max=32, **options)  # type: ignore[arg-type]


def check_as_alone(rig: Rig, *indices: int) -> None:
    for i in indices:
        result = rig.requests[i].stream.wait(0)
        assert (result.tokens, result.finish_reason) == rig.requests[i].alone


def test_no_counter_goes_back() -> None:
    """Looked at behind each call, before its steps are accounted: a prompt gives no tokens."""
    rig, seen = rig_of(), [(0, 0)]
    compute = rig.machine.compute

    def computed(*given: Any) -> Any:
        run = compute(*given)
        rig.machine.flush()
        stats = stats_of(rig.core)
        seen.append((stats.tokens, stats.decode_rows))
        return run

    rig.machine.compute = computed  # type: ignore[assignment, method-assign]
    rig.submit_all([[*range(1, 40)], *PROMPTS], greedy(4))
    rig.run()
    assert seen == sorted(seen)
    assert seen[-1][0] == rig.scheduler.counters.tokens


def test_a_policy_that_says_nothing_is_asked_at_every_step() -> None:
    class Plain:
        def __init__(self) -> None:
            self.n_plans, self._usual = 0, sarathi()

        def plan(self, view: StepView) -> Plan:
            self.n_plans += 1
            plan = self._usual.plan(view)
            return plan._replace(repeat=1)

    policy = Plain()
    rig = rig_of(policy=policy)
    rig.submit(PROMPTS[0], greedy(40))
    rig.run()
    check_as_alone(rig, 0)
    assert policy.n_plans == rig.machine.n_steps
    assert set(rig.machine.runs) == {1}


@pytest.mark.parametrize("at", [0, 1, 5, 12, 31])
def test_a_stop_string_in_the_middle_of_a_run(at: int) -> None:
    """What came behind it never was; the neighbours keep their tokens."""
    rig = rig_of()
    tokens, _ = solo(PROMPTS[0], greedy(40))
    assert len(tokens) > 31
    first = next(i for i, t in enumerate(tokens) if f"{t} ".endswith(f"{tokens[at]} "))
    stop = f"{tokens[at]} "
    rig.submit(PROMPTS[0], greedy(40, stop=(stop,)))
    rig.submit_all(PROMPTS[1:], greedy(40))
    rig.run()
    rig.check()
    result = rig.requests[0].stream.wait(0)
    assert (result.finish_reason, result.stop) == ("stop", stop)
    assert result.tokens == tokens[: first + 1]
    assert result.text == "".join(f"{t} " for t in tokens[: first + 1])[: -len(stop)]
    check_as_alone(rig, 1, 2, 3)
    delivered = sum(len(request.stream.tokens) for request in rig.requests)
    ended = sum(r.stream.wait(0).stop == EOG for r in rig.requests)
    assert rig.n_tokens == delivered + ended


@pytest.mark.parametrize("step", [2, 3, 9])
def test_cancel_in_the_middle_of_a_run_ends_it_after_that_step(step: int) -> None:
    rig = rig_of()
    streams = rig.submit_all(PROMPTS, greedy(40))
    rig.machine.meanwhile = lambda n: n == step and streams[2].cancel()
    rig.run()
    result = streams[2].wait(0)
    assert result.finish_reason == "cancelled"
    assert result.tokens == solo(PROMPTS[2], greedy(40))[0][:step]
    check_as_alone(rig, 0, 1, 3)


def test_a_submission_in_the_middle_of_a_run_joins_at_the_next_step() -> None:
    rig = rig_of()
    rig.submit(PROMPTS[0], greedy(40))
    rig.machine.meanwhile = lambda n: n == 7 and rig.submit(PROMPTS[1], greedy(40))
    rig.run()
    check_as_alone(rig, 0, 1)
    assert rig.machine.runs[0] == 6  # steps 2 to 7; step 8 has the prompt
    assert rig.scheduler.counters.prefill_rows == len(PROMPTS[0]) + len(PROMPTS[1]) - 2


def test_a_row_that_can_not_be_sampled_in_the_middle_of_a_run() -> None:
    rig = rig_of()
    streams = rig.submit_all(PROMPTS, greedy(40))
    rig.machine.meanwhile = lambda n: rig.machine.failing.update({3} if n == 6 else ())
    rig.run()
    with pytest.raises(SamplingError, match="nothing to choose for 3"):
        streams[3].result(0)
    assert streams[3].tokens == solo(PROMPTS[3], greedy(40))[0][:5]
    check_as_alone(rig, 0, 1, 2)
    ends = sum(result.wait(0).stop == EOG for result in streams)
    assert rig.n_tokens == sum(len(stream.tokens) for stream in streams) + ends


@pytest.mark.parametrize("full", range(1, 12))
def test_a_call_that_finds_no_room_for_its_results_ends_the_step(full: int) -> None:
    """In streams the call behind it samples from the prompt that it was to compute."""
    rig = Rig(Limits(64, 64, 3, 3 * 128, 128, unified=False), n_steps_max=4)
    calls = count(1)
    rig.machine._has_room = lambda: next(calls) != full  # type: ignore[method-assign]
    rig.submit_all(PROMPTS[:3], greedy(9))
    rig.turn()
    rig.submit_all([*PROMPTS[3:], [41, 2]], greedy(5))
    rig.run()
    assert rig.reasons.count("length") + rig.reasons.count("stop") == 5
    rig.check_solo()
