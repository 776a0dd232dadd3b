"""The step bench measures what it says, and computes its figures from its rows."""

from __future__ import annotations

import pytest

from bench import schema
from bench.__main__ import main
from bench.null import TOKEN, NullEngine
from bench.step import TARGETS, detail_of


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[schema.Row]:
    out = tmp_path_factory.mktemp("step") / "rows.jsonl"
    assert main(["step", "--quick", "--tokens", "16", "--out", str(out)]) == 0
    return list(schema.read(out))


def test_every_arm_has_its_figures(rows: list[schema.Row]) -> None:
    assert [row.error for row in rows] == [""] * len(rows)
    for row in rows:
        detail = row.detail
        if row.arm.startswith("python"):
            assert detail["step_us"] == pytest.approx(detail["decoder_us"] + detail["delivery_us"])
            assert detail["n_steps"] >= 40 * 16
            assert row.t_tg == pytest.approx(1e-6 * detail["step_us"] * 16)
        elif row.arm.startswith("stepper"):
            assert detail["over_c_us"] == pytest.approx(detail["python_us"] - detail["c_us"])
            assert detail["c_us"] > 0
        else:
            assert 0 < detail["gap_p50_us"] <= detail["gap_p99_us"] <= detail["gap_max_us"]
            assert 0 < detail["gap_share"] < 1
            assert row.t_tg > 0
    calls = {row.arm: row.detail.get("native_calls", 0) for row in rows}
    assert calls["gap: turnover"] > calls["gap: steady"]
    assert [target.measured(rows) for target in TARGETS] == [
        detail_of("python: steady", "step_us")(rows),
        detail_of("stepper: 1", "over_c_us")(rows),
    ]


@pytest.mark.parametrize("most", [1, 7])
def test_the_machine_that_computes_nothing_lets_the_engine_do_all_of_its_work(most: int) -> None:
    engine = NullEngine(4, most, stops=("never",), read=True)
    lengths = [5, 40, 300, 17, 33, 2]
    for n in lengths:
        engine.submit(n)
    streams = []
    for _ in range(1000):
        engine.turn()
        here = [r.stream for r in engine._core.slot_table.open.values() if r.slot >= 0]
        streams += [stream for stream in here if stream not in streams]
        if engine.n_finished == len(lengths):
            break
    assert [stream.result(0).tokens for stream in sorted(streams, key=lambda s: s.id)] == [
        [TOKEN] * n for n in lengths
    ]
    assert engine._core.scheduler.counters.tokens == sum(lengths)
