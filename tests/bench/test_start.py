"""How the servers are started whose first token is timed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from bench import start
from bench.case import Case


@pytest.mark.parametrize("n", [-1, 7])
def test_a_server_has_the_layers_on_the_gpu_that_its_record_says(
    case: Case, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    class Started(Exception):
        pass

    def server(words: Sequence[str], *_: Any) -> None:
        raise Started(" ".join(words))

    monkeypatch.setattr(start, "ServerProcess", server)
    monkeypatch.setattr(start, "tool", lambda name, log: name)
    for arm in start.all_arms():
        with pytest.raises(Started) as started:
            arm.run(replace(case, n_gpu_layers=n))
        assert ("-ngl 7" in str(started.value)) == (n == 7)
