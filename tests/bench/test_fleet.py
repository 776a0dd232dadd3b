"""The clients of a fleet count what they get. The fleet itself: pytest -m ray tests/cluster."""

from dataclasses import replace

import pytest

from bench import fleet
from bench.case import Case
from bench.serving import WrongAnswer
from pyllamabatch.llama.model import Model
from tests.support.served import serving


def test_clients_ask_again_until_all_is_answered(model: Model, case: Case) -> None:
    jobs = fleet.jobs(replace(case, pl=2), 2, 0)
    assert sum(len(prompt) for mine in jobs for prompt, _ in mine) == 4 * 250
    jobs = [[(prompt, 8) for prompt, _ in mine] for mine in jobs]
    with serving(model) as served:
        found = fleet.ask_all(served.url, "greedy", jobs)
        assert len(found) == 4
        assert all(asked < first <= end for asked, first, end in found)
        with pytest.raises(WrongAnswer, match="4096"):
            fleet.ask_all(served.url, "greedy", [[([40] * 4096, 8)]])
