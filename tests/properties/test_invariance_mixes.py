"""No sequence pays for a neighbour, on the embedded model: 200 random mixes of arrivals, cancels,
deadlines, samples of one prompt, interactive forks, common prefixes, far too few cells and
failing decodes, in engines of every kind. Each request that finishes has the tokens that it gets
alone through raw calls, and each that ends early has the first of them."""

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stream import Stream
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.embedded import N_TOKENS, check, texts
from tests.support.engines import EXACT, Checked, check_idle
from tests.support.faults import set_fault
from tests.support.oracle import Agreement, Reference

engines = st.fixed_dictionaries(
    {
        "n_seq_max": st.integers(1, 6),
        "n_ctx": st.sampled_from([256, 256, 512, 2048]),
        "n_batch": st.sampled_from([32, 64, 512]),
        "prefix_cache": st.booleans(),
        "preemption": st.sampled_from(["auto", "recompute", "swap"]),
        "swap_bytes": st.sampled_from([0, 10**9]),
        "kv_unified": st.sampled_from([True, True, True, False]),
    }
)
requests = st.lists(
    st.tuples(
        st.integers(0, 11),  # prompt
        st.integers(1, N_TOKENS),
        st.sampled_from([1, 1, 1, 3]),  # samples
        st.sampled_from(["stay", "stay", "stay", "cancel", "wait", "soon", "later", "interactive"]),
    ),
    min_size=1,
    max_size=10,
)
TIMEOUTS = {"soon": 0.004, "later": 0.03}
faults = st.lists(
    st.tuples(st.integers(1, 15), st.sampled_from([1, 2, -3]), st.sampled_from([0, 5, -1])),
    max_size=3,
)


def interactive(engine: Engine, prompt: list[int], n: int) -> list[list[int]]:
    """`n` tokens of a sequence, and of one that leaves it half way."""
    greedy = SamplingParams(temperature=0, ignore_eog=True)
    with engine.sequence(greedy) as seq:
        seq.prompt(prompt)
        for _ in range(n // 2):
            seq.sample()
        with seq.fork() as other:
            for _ in range(n - n // 2):
                other.sample()
                seq.sample()
            return [seq.tokens[len(prompt) :], other.tokens[len(prompt) :]]


def test_every_request_gets_what_it_gets_alone(
    embedded_model: Model, embedded_alone: list[Reference]
) -> None:
    prompts = texts(embedded_model.n_vocab)
    seen: Counter[str] = Counter()
    agreement = Agreement()

    @settings(max_examples=200)
    @given(engines, requests, faults)
    def mix(
        options: dict[str, Any],
        requests: list[tuple[int, int, int, str]],
        faults: list[tuple[int, int, int]],
    ) -> None:
        if not options["kv_unified"]:
            options["n_ctx"] = 256 * options["n_seq_max"]
        # Owners who share one slot give it up at once, or each token would take their patience.
        with Engine(embedded_model, n_ubatch=32, patience=0.002, **{**options, **EXACT}) as engine:
            checked = Checked(engine, may_fail=bool(faults))
            streams: list[tuple[Stream, int, int]] = []
            left = faults.copy()
            for which, n, n_samples, what in requests:
                if left:
                    with engine._core.state:
                        # Of another kind behind one that is being dealt with, it would be the
                        # second failure of that step, which ends who is in it.
                        if engine._core.recovery._n_failures == 0:
                            nth, code, n_rows = left.pop()
                            # A fatal one twice: a fresh context.
                            set_fault(engine._stepper, nth, code, n_rows, 1 + (code == -3))
                if what == "interactive":
                    for tokens in interactive(engine, prompts[which], n):
                        assert len(tokens) == n
                        check(agreement, embedded_alone[which], tokens)
                    seen["interactive"] += 1
                    continue
                params = SamplingParams(temperature=0, max_tokens=n, ignore_eog=True)
                terms: dict[str, Any] = {}
                if what in TIMEOUTS:
                    terms["timeout"] = TIMEOUTS[what]
                for stream in engine.submit_n(prompts[which], params, n_samples, **terms):
                    streams.append((stream, which, n))
                if what == "wait":
                    stream.wait(60)
                elif what == "cancel":
                    stream.cancel()
            results = [stream.wait(60) for stream, _, _ in streams]
            assert engine.drain(60)
            stats = check_idle(engine)
        assert stats.finished["error"] == 0
        assert checked.n_checks > 0 or stats.steps == 0
        assert stats.submitted == len(streams) == sum(stats.finished.values())
        for result, (_, which, n) in zip(results, streams, strict=True):
            assert result.n_generated == n or result.finish_reason in ("cancelled", "deadline")
            check(agreement, embedded_alone[which], result.tokens)
            seen[result.finish_reason] += 1
        for name in ("preemptions", "restarts", "swapped_tokens", "prefix_tokens"):
            seen[name] += getattr(stats, name) > 0

    mix()
    assert agreement.fraction > 0.9
    kinds = ["length", "cancelled", "deadline", "interactive"]
    kinds += ["preemptions", "restarts", "swapped_tokens", "prefix_tokens"]
    assert min(seen[kind] for kind in kinds) >= 5, seen
