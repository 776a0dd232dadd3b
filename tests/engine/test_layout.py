"""How an engine divides its cells: streams where they suffice, a pool when a sequence needs one."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pyllamabatch.engine import layout
from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError, RequestTooLong
from pyllamabatch.llama.model import Model
from tests.support.engines import EXACT, greedy, held
from tests.support.made_up_costs import Linear
from tests.support.speculating import LOOP, always


def engine_on(model: Model, **options: Any) -> Engine:
    return Engine(model, **{"n_seq_max": 2, **EXACT, **options})


def prompt(n: int, seed: int = 0) -> list[int]:
    return [1, *(20 + (i * i + seed) % 200 for i in range(n - 1))]


@pytest.mark.parametrize(
    ("options", "unified", "n_ctx", "why"),
    [
        ({}, False, 2 * 2048, "2048 cells for each of 2 sequences"),
        ({"n_ctx": 2048}, False, 2048, "1024 cells for each"),
        ({"n_ctx": 512}, True, 512, "a stream would have 256 cells"),
        ({"n_ctx": 2048, "kv_unified": True}, True, 2048, "asked for"),
        ({"n_ctx": 512, "kv_unified": False}, False, 512, "asked for"),
        ({"n_seq_max": 32, "kv_unified": True}, True, 16384, "asked for"),
        ({"n_seq_max": 1}, True, 2048, "one sequence"),
        ({"n_seq_max": 16, "n_ctx": 10}, True, 256, "a stream would have 1 cells"),
        ({"n_seq_max": 16, "n_ctx": 10, "kv_unified": False}, False, 16 * 256, "asked for"),
        ({"n_seq_max": 16, "n_ctx": 16}, True, 256, "a stream would have 1 cells"),
    ],
)
def test_streams_where_their_cells_suffice(
    model: Model, options: dict[str, Any], unified: bool, n_ctx: int, why: str
) -> None:
    with engine_on(model, **options) as engine:
        assert (engine.limits.unified, engine.n_ctx) == (unified, n_ctx)
        assert engine.capabilities.unified == unified
        assert why in engine.layout


def test_streams_by_default_leave_memory_to_others(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = layout.bytes_of_cell(model, EXACT)
    monkeypatch.setattr(layout, "free_memory", lambda model: int(4 * cell * 4 * 1024))
    with engine_on(model) as engine:
        assert not engine.limits.unified
        assert engine.n_ctx == 2 * 1024
    monkeypatch.setattr(layout, "free_memory", lambda model: int(4 * cell * 4 * 511))
    with engine_on(model) as engine:
        assert engine.limits.unified
        assert "free memory" in engine.layout


@pytest.mark.parametrize("speculate", [None, "ngram"])
def test_zero_outputs_are_as_many_as_the_engine_needs(model: Model, speculate: str | None) -> None:
    names, found = ("n_outputs_max", "n_outputs_max_per_seq"), list[Any]()
    for given in (dict[str, int](), dict.fromkeys(names, 0)):
        with engine_on(model, speculate=speculate, **given) as engine:
            found.append([engine._context.params[name] for name in names])
    assert found[0] == found[1]
    assert found[0][1] == (1 if speculate is None else 1 + layout.DRAFT_MOST)


def test_another_layout_is_refused(model: Model) -> None:
    with pytest.raises(ArgumentError, match=r'kv_unified=.pool.*"auto"'):
        engine_on(model, kv_unified="pool")


def test_a_long_request_makes_streams_a_pool_and_no_token_changes(model: Model) -> None:
    short, long = prompt(40), prompt(1100, 7)
    with engine_on(model, kv_unified=True, n_ctx=2048) as engine:
        expected = [r.tokens for r in engine.generate([short, long], [greedy(300), greedy(200)])]
    with engine_on(model, n_ctx=2048, speculate="auto", cost=Linear(row_s=1e-6)) as engine:
        with held(engine, 24):
            first = engine.submit(short, greedy(300))
            iterator = iter(first)
            begun = [next(iterator).token for _ in range(20)]
            second = engine.submit(long, greedy(200))
        results = [first.result(60), second.result(60)]
        assert [r.tokens for r in results] == expected
        assert begun == expected[0][:20]
        stats = engine.stats()
        assert engine.limits.unified
        drafting = engine._core.scheduler.drafting
        assert drafting is not None
        assert drafting.limits == engine.limits
        assert engine.n_ctx == 2048
        assert engine.capabilities.prefix_copy
        assert "a sequence needed it" in engine.layout
        assert stats.restarts == 0
        assert stats.preemptions == 1
        again = engine.generate([short, long], [greedy(300), greedy(200)])
        assert [r.tokens for r in again] == expected
        assert engine.stats().prefix_tokens > 0  # the cache works in the pool, too


def test_a_pool_that_pays_no_more_is_streams_again_and_no_token_changes(model: Model) -> None:
    short, long = prompt(40), prompt(1100, 7)
    with engine_on(model, kv_unified=True, n_ctx=2048) as engine:
        expected = [r.tokens for r in engine.generate([short, long], [greedy(300), greedy(20)])]
    cost: Any = Linear(row_s=1e-6, cell_s=0.1)  # so every step loses seconds by what is cached
    with engine_on(model, n_ctx=2048, cost=cost) as engine:
        layout = engine.layout, engine.limits, engine.capabilities
        for _ in range(2):
            assert engine.generate([long], greedy(20))[0].tokens == expected[1]
            assert engine.limits.unified
            assert engine.generate([short], greedy(300))[0].tokens == expected[0]
            assert (engine.layout, engine.limits, engine.capabilities) == layout
        assert engine.stats().preemptions == 2
        assert engine.stats().layout_changes == 4
        assert engine.stats().restarts == 0


@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])
def test_an_answer_that_outgrows_its_stream_goes_on_with_the_same_tokens(
    model: Model, drafts: bool
) -> None:
    options: dict[str, Any] = {"policy": always(8, 64)} if drafts else {"speculate": None}
    prompts = [prompt(40), prompt(450, 7)]
    params = [greedy(n, logit_bias=LOOP if drafts else {}) for n in (300, 200)]
    with engine_on(model, kv_unified=True, n_ctx=1024, speculate=None) as engine:
        expected = [r.tokens for r in engine.generate(prompts, params)]
    with engine_on(model, n_ctx=1024, cost=Linear(row_s=1e-6), **options) as engine:
        assert [r.tokens for r in engine.generate(prompts, params)] == expected
        assert engine.limits.unified
        stats = engine.stats()
        assert stats.preemptions > 0
        assert stats.restarts == 0
        assert (stats.accepted_tokens > 0) == drafts


def test_a_large_budget_alone_is_no_reason_for_a_pool(model: Model) -> None:
    with engine_on(model, n_ctx=1024) as engine:
        stop = engine.generate([prompt(40)], greedy(30))[0].tokens[10]
        params = greedy(900, stop_token_ids=[stop])
        assert len(engine.generate([prompt(40)], params)[0].tokens) <= 11
        assert not engine.limits.unified
        assert engine.stats().preemptions == 0


def test_too_long_is_what_even_the_pool_can_not_hold(model: Model) -> None:
    with engine_on(model, n_ctx=2048) as engine:
        with pytest.raises(RequestTooLong, match="can have 2048"):
            engine.submit(prompt(2000), greedy(50))
        assert not engine.limits.unified


def test_an_interactive_sequence_grows_beyond_a_stream(model: Model) -> None:
    with engine_on(model, n_ctx=1024) as engine, engine.sequence(greedy(1)) as one:
        with engine.sequence(greedy(1)) as other:
            other.prompt(prompt(30, 3))
            before = [other.sample().token for _ in range(5)]
            one.prompt(prompt(500))
            one.sample()
            assert not engine.limits.unified
            one.prompt(prompt(100, 5))
            token = one.sample().token
            assert engine.limits.unified
            before += [other.sample().token for _ in range(5)]
        with engine.sequence(greedy(1)) as same:
            same.prompt(prompt(30, 3))
            assert [same.sample().token for _ in range(10)] == before
        assert token in one.tokens


@pytest.mark.parametrize("n", [8, 32])
def test_a_prefix_that_all_have_is_computed_once_in_streams(model: Model, n: int) -> None:
    common = prompt(500)
    prompts = [[*common, *prompt(9, i)[1:]] for i in range(n)]
    with engine_on(model, n_seq_max=8, n_ctx=8 * 768, n_batch=512) as engine:
        assert not engine.limits.unified
        together = engine.generate(prompts, greedy(6))
        assert engine.stats().prefill_rows <= 500 + n * 10 + 64
    with engine_on(model, n_ctx=1536, prefix_cache=False) as engine:
        alone = [engine.generate([one], greedy(6))[0].tokens for one in prompts[:8]]
    assert [r.tokens for r in together[:8]] == alone


def test_what_is_cached_survives_those_that_come_and_go(model: Model) -> None:
    system = prompt(300)
    with engine_on(model, n_seq_max=4, n_ctx=4096) as engine:
        for i in range(6):
            engine.generate([[*system, 50 + i]], greedy(4))
        before = engine.stats()
        engine.generate([prompt(200, 40 + i) for i in range(8)], greedy(4))
        engine.generate([[*system, 90]], greedy(4))
        after = engine.stats()
    assert after.prefix_tokens - before.prefix_tokens == 300


def test_threads_may_ask_for_too_much_while_others_run(model: Model) -> None:
    """Many submit at once, some of them more than a stream holds: each gets its tokens."""
    sizes = [30, 700, 60, 1200, 90, 20]
    with engine_on(model, kv_unified=True, n_ctx=2048) as engine:
        expected = [engine.generate([prompt(n, n)], greedy(30))[0].tokens for n in sizes]
    with engine_on(model, n_seq_max=3, n_ctx=2048) as engine, ThreadPoolExecutor(6) as pool:
        asked = pool.map(lambda n: engine.submit(prompt(n, n), greedy(30)).result(60), sizes)
        assert [result.tokens for result in asked] == expected
