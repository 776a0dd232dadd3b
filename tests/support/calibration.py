"""Calibration of a tiny model in a second, however busy the machine is."""

from math import inf

import pytest

from pyllamabatch.cost.profile import Shape


def calm_and_small(monkeypatch: pytest.MonkeyPatch, n_rounds: int = 2) -> None:
    """A handful of shapes of each kind, and no step counts as disturbed. Its rounds end it, long
    before a budget of minutes does."""
    decode = [Shape(n, depth=8) for n in (1, 2, 3, 4)]
    prompts = [Shape(12, 10, 1, 8), Shape(16, 16, 1), Shape(20, 20, 1)]
    shapes = [*decode, *prompts, Shape(2, depth=40), Shape(8, 8, 1, 40)]
    at = "pyllamabatch.cost.calibrate."
    monkeypatch.setattr(at + "plan_shapes", lambda *_: shapes)
    monkeypatch.setattr(at + "_WANTED", (1, 3, 6)[:n_rounds])
    monkeypatch.setattr(at + "N_CTX", 2048)
    monkeypatch.setattr(at + "_DIFFER", inf)
    monkeypatch.setattr(at + "OtherLoad.disturbs", lambda _: False)
    monkeypatch.setattr("pyllamabatch.cost.rig._UNDISTURBED", 0.0)
