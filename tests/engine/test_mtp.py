"""An engine whose model has layers that predict further tokens."""

from pathlib import Path
from typing import Any

import pytest

from pyllamabatch.cost.step_cost import NewGraph
from pyllamabatch.errors import ArgumentError, UnsupportedOperation
from pyllamabatch.llama.batch import Batch
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import Stepper
from tests.support.decoding import recurrent_with_mtp, with_mtp, write
from tests.support.engines import Checked, check_idle, greedy
from tests.support.made_up_costs import Linear
from tests.support.models_special import mimo2_path, write_mimo2
from tests.support.speculating import PROMPTS, always, engine_of

LAYOUTS = pytest.mark.parametrize("kv_unified", [True, False], ids=["pool", "streams"])


@LAYOUTS
def test_prompts_in_chunks_and_from_the_prefix_cache_are_drafted_behind(kv_unified: bool) -> None:
    """More of them than slots, so that some come while others decode. The second time their
    prefixes are in the cache, and what the layers have of these, too."""
    model = with_mtp()
    drawn = SamplingParams(temperature=0.7, seed=3, max_tokens=50, ignore_eog=True)
    prompts = [PROMPTS[0] * 6, PROMPTS[1] * 4, PROMPTS[2], PROMPTS[3] * 5]
    params = [greedy(60), greedy(40), greedy(60), drawn]
    size: dict[str, Any] = {"kv_unified": kv_unified, "n_ctx": 2048, "n_seq_max": 3}
    with engine_of(model, **size) as engine:
        expected, plain = engine.generate(prompts, params), check_idle(engine)
    with engine_of(model, speculate="mtp", policy=always(4, 16), **size) as engine:
        checked = Checked(engine)
        shares = []
        for _ in range(2):
            before = engine.stats()
            results = engine.generate(prompts, params)
            assert [r.tokens for r in results] == [r.tokens for r in expected]
            stats = check_idle(engine)
            n = stats.drafted_tokens - before.drafted_tokens
            shares.append((stats.accepted_tokens - before.accepted_tokens) / n)
        assert checked.n_steps == stats.steps < 2 * 0.8 * plain.steps
    assert shares[0] > 0.2
    assert shares[1] > 0.7 * shares[0]


def test_what_has_ended_makes_room(caplog: pytest.LogCaptureFixture) -> None:
    """Cells of requests that are over are given to those that run, and none lacks any."""
    prompts, size = [prompt * 4 for prompt in PROMPTS], {"n_ctx": 300, "kv_unified": True}
    model = recurrent_with_mtp()
    with engine_of(model, **size) as engine:
        expected = [r.tokens for r in engine.generate(prompts, greedy(40))]
    with engine_of(model, speculate="mtp", policy=always(4, 8), **size) as engine:
        assert [r.tokens for r in engine.generate(prompts, greedy(40))] == expected
        stats = check_idle(engine)
        assert stats.accepted_tokens > 0.3 * stats.drafted_tokens > 0
    assert "without drafts" not in caplog.text


def test_of_several_layers_the_first_one_drafts(tmp_path: Path) -> None:
    path = tmp_path / "several.gguf"
    write_mimo2(path, n_nextn=3, writes=0.02)
    with Model(path, load_mtp=True) as model:
        with engine_of(model) as engine:
            expected = [r.tokens for r in engine.generate(PROMPTS[:3], greedy(40))]
        with engine_of(model, speculate="mtp", policy=always(4, 16)) as engine:
            assert [r.tokens for r in engine.generate(PROMPTS[:3], greedy(40))] == expected
            assert engine.stats().accepted_tokens > 0.1 * engine.stats().drafted_tokens > 0


def test_what_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no layers that predict.*take ngram or draft:FILE"):
        engine_of(model, speculate="mtp")
    with Model(mimo2_path()) as without:
        with pytest.raises(ArgumentError, match=r"Model\(path, load_mtp=True\)"):
            engine_of(without, speculate="mtp")
        with pytest.raises(ArgumentError, match="load_mtp=True"):
            Context(without, ctx_type="mtp")
    stripped = tmp_path / "stripped.gguf"
    write_mimo2(stripped, stripped=True)
    with Model(stripped, load_mtp=True) as named:
        with pytest.raises(ArgumentError, match="lacks the layers"):
            engine_of(named, speculate="mtp")
        with engine_of(named) as engine:
            assert len(engine.submit(PROMPTS[0], greedy(3)).result().tokens) == 3


def test_rows_without_hidden_states_are_refused() -> None:
    """libllama would abort."""
    with Context(with_mtp(), n_ctx=256, ctx_type="mtp") as context:
        batch = Batch(4)
        batch.extend([1, 2, 3], 0, 0)
        with pytest.raises(UnsupportedOperation, match="hidden states"):
            context.decode(batch)


def test_gaps_between_streams_stay_gaps() -> None:
    """A row that fills one up has no hidden state: libllama would abort."""
    cells: dict[str, Any] = {"n_ctx": 768, "n_seq_max": 3, "kv_unified": False}
    with Context(with_mtp(), ctx_type="mtp", **cells) as context:
        with pytest.raises(ArgumentError, match="gap_max=1: 0 on a context of layers that predict"):
            Stepper(context, gap_max=1)
        with Stepper(context) as stepper:
            for at, seq in enumerate((0, 2)):
                stepper.set_slot(seq, greedy(5))
                write(stepper, [300], seq=seq, at=at)
            assert stepper.step(2).n_results == 2
            assert stepper._info.n_filled == 0


def test_all_rows_of_a_step_are_one_batch() -> None:
    """Though a new graph is dear: what the layer starts from are the states of the last batch."""
    dear: Any = Linear(0.01, new_graph=NewGraph(10.0, 10.0))
    how: dict[str, Any] = {"kv_unified": False, "cost": dear, "n_seq_max": 3}
    model = with_mtp()
    for drafter in (None, "mtp"):
        with engine_of(model, speculate=drafter, **how) as engine:
            builder = engine._core.scheduler._builder
            assert builder._comes_behind(1, 2) == (drafter is None)
            assert not builder._limits.fills or drafter is None  # their rows have no states


def test_the_same_bits_as_without() -> None:
    cells = {"flash_attn_type": "enabled", "type_k": "f16", "type_v": "f16"}
    how: dict[str, Any] = {"batch_invariant": True, "n_ctx": 3 * 512, **cells}
    prompts = [PROMPTS[0] * 6, PROMPTS[1] * 3, PROMPTS[2]]
    params = [greedy(60, logprobs=2), greedy(40, logprobs=2), SamplingParams(seed=3, logprobs=2)]
    model = with_mtp()
    with engine_of(model, speculate=None, **how) as engine:
        expected = [engine.submit(*one).result() for one in zip(prompts, params, strict=True)]
    with engine_of(model, speculate="mtp", policy=always(3, 8), **how) as engine:
        results = engine.generate(prompts, params)
        assert check_idle(engine).accepted_tokens > 0
    assert [r.logprobs for r in results] == [r.logprobs for r in expected]
