"""Device sampling: the shortlist gives what whole rows give, and steps that ask for more get them.

The CPU backend is the device here: the same graph, the same way back to the host."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.batch import Batch
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import OUTPUT, SAMPLE, Finish, Stepper
from tests.support.decoding import begin, write
from tests.support.engines import EXACT, engine_on
from tests.support.models_gguf import ARCHITECTURES, Architecture, write_gguf

N_SEQ = 5
WIDE = Architecture("llama", ("attention",) * 3, n_spare=4000)
WIDE_STATE = Architecture("lfm2", ARCHITECTURES["lfm2"].layers, qk_norm=True, n_spare=4000)
Tokens = npt.NDArray[np.int32]


@pytest.fixture(scope="module", params=[WIDE, WIDE_STATE], ids=["llama", "lfm2"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    write_gguf(path, request.param)
    with Model(path) as model:
        yield model


def context_of(model: Model, **params: Any) -> Context:
    given: dict[str, Any] = {"n_ctx": 2048, "n_batch": 128, "n_ubatch": 128, "n_seq_max": N_SEQ}
    return Context(model, **(given | {"n_outputs_max": N_SEQ, "n_threads": 1} | params))


def prompt(seq: int, n: int) -> Tokens:
    return np.random.default_rng(seq).integers(10, 4000, n, dtype=np.int32)


def generate(
    stepper: Stepper, each: Sequence[SamplingParams], n_steps: int, *, on_device: int
) -> list[list[int]]:
    """Prompts of different lengths in one step, then steps of one row each. `on_device`: what
    every step has to say of itself."""
    tokens: list[list[int]] = [[] for _ in each]
    rows, n = stepper.rows, 0
    prompts = [prompt(seq, 3 + 7 * (seq % 3)) % stepper.n_vocab for seq in range(len(each))]
    for seq, (params, given) in enumerate(zip(each, prompts, strict=True)):
        stepper.set_slot(seq, params, given)
        n = write(stepper, given, seq=seq, at=n)
    result = stepper.step(n)
    for step in range(n_steps):
        result.raise_for_code()
        assert stepper._info.on_device == on_device
        for seq, token, finish in zip(result.seq, result.token, result.finish, strict=True):
            assert finish == Finish.NONE
            tokens[seq].append(int(token))
        n = len(each)
        order = np.roll(np.arange(n, dtype=np.int32), step)  # rows in any order
        rows.token[:n] = [tokens[seq][-1] for seq in order]
        rows.pos[:n] = [len(prompts[seq]) + step for seq in order]
        rows.seq[:n], rows.flags[:n] = order, SAMPLE
        result = stepper.step(n)
    return tokens


def mixed(seed: int) -> list[SamplingParams]:
    each: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"top_k": 100, "top_p": 1.0, "min_p": 0.0, "temperature": 2.0},
        {"top_k": 7, "ignore_eog": True, "stop_token_ids": (5, 6)},
        {"top_p": 0.5, "min_p": 0.2, "min_tokens": 3},
    ]
    return [
        SamplingParams(**{"max_tokens": 100, "seed": seed + i, "ignore_eog": True, **options})
        for i, options in enumerate(each)
    ]


@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("n_ubatch", [128, 16])
def test_the_same_tokens_as_from_whole_rows(model: Model, kv_unified: bool, n_ubatch: int) -> None:
    params = {"kv_unified": kv_unified, "n_ubatch": n_ubatch}
    for seed in range(3):
        both = []
        for on_device in (True, False):
            with (
                context_of(model, **params) as context,
                Stepper(context, device_sampling=on_device) as stepper,
            ):
                each = generate(stepper, mixed(100 * seed), 12, on_device=int(on_device))
                both.append(each)
        assert both[0] == both[1]
        assert len({*both[0][0]}) > 3  # and not because there was nothing to choose


ASKS_FOR_MORE: list[dict[str, Any]] = [
    {"logprobs": 0}, {"top_k": 0}, {"top_k": 127}, {"repeat_penalty": 1.1},
    {"logit_bias": {7: 2.0}}, {"typical_p": 0.9}, {"grammar": "root ::= [a-z]+"},
]  # fmt: skip


@pytest.mark.parametrize("options", ASKS_FOR_MORE, ids=lambda options: next(iter(options)))
def test_a_row_that_asks_for_more_gets_it(model: Model, options: dict[str, Any]) -> None:
    both = []
    for device_sampling in (True, False):
        with (
            context_of(model) as context,
            Stepper(context, device_sampling=device_sampling) as stepper,
        ):
            each = mixed(7)
            before = generate(stepper, each, 3, on_device=int(device_sampling))
            context.memory.clear()
            each[1] = SamplingParams(max_tokens=100, seed=9, ignore_eog=True, **options)
            during = generate(stepper, each, 3, on_device=0)
            context.memory.clear()
            after = generate(stepper, mixed(7), 3, on_device=int(device_sampling))
        assert before == after
        both.append((before, during))
    assert both[0] == both[1]


@pytest.mark.parametrize("n_between", [1, 8200])
def test_a_graph_of_long_ago_may_be_used_again(model: Model, n_between: int) -> None:
    """That of decoding, while prompts with an output have graphs of their own; those, too, when
    there were more of them than are remembered."""
    both = []
    for device_sampling in (True, False):
        with (
            context_of(model, kv_unified=False) as context,
            Stepper(context, device_sampling=device_sampling) as stepper,
        ):
            tokens = generate(stepper, mixed(1)[:3], 4, on_device=int(device_sampling))
            for i in range(n_between):
                context.memory.seq_rm(4)
                stepper.set_slot(4, SamplingParams(max_tokens=9, seed=i, ignore_eog=True))
                stepper.step(write(stepper, prompt(4, 2 + i % 2), seq=4)).raise_for_code()
                assert stepper._info.on_device == int(device_sampling)
            run = stepper.run(np.arange(3, dtype=np.int32), 3)
            assert run.n_steps == 3
            both.append((tokens, run.token.tolist()))
    assert both[0] == both[1]


N_DRAFT = 4


def drafted(
    model: Model, each: Sequence[SamplingParams], right: list[list[int]], **how: Any
) -> Any:
    """Tokens of each, with drafts that are right up to a random token, and whether the device chose
    in steps with drafts, and without."""
    outputs = {"n_outputs_max": N_SEQ * (1 + N_DRAFT), "n_outputs_max_per_seq": how.pop("per_seq")}
    random, tokens = np.random.default_rng(3), [list[int]() for _ in each]
    on_device: dict[bool, set[int]] = {True: set(), False: set()}
    sampled = how.pop("device_sampling")
    with (
        context_of(model, **outputs, **how) as context,
        Stepper(context, device_sampling=sampled, n_draft_max=N_DRAFT) as stepper,
    ):
        drafts = stepper.drafts
        assert drafts is not None
        for seq, params in enumerate(each):
            tokens[seq].append(begin(stepper, params, prompt(seq, 3 + 7 * (seq % 3)), seq=seq))
        for step in range(12):
            for seq, known in enumerate(tokens):
                given = right[seq][len(known) :][: int(random.integers(0, N_DRAFT + 1))]
                wrong = int(random.integers(0, 6))  # from here on
                given[wrong:] = [7] * len(given[wrong:])
                n = 0 if step % 4 == 3 else len(given)  # a step in four has none
                drafts.n_most[seq] = drafts.n_given[seq] = n
                drafts.token[seq, :n] = given[:n]
            order = np.roll(np.arange(len(each), dtype=np.int32), step)  # slots in any order
            run = stepper.run(order, 1)
            assert (run.n_steps, run.code) == (1, 0)
            on_device[bool(run.steps[0]["n_drafted"])].add(int(run.steps[0]["on_device"]))
            for seq, token in zip(run.seq.tolist(), run.token.tolist(), strict=True):
                tokens[seq].append(token)
    return tokens, on_device[True], on_device[False]


@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("n_ubatch", [128, 32])
def test_drafted_rows_are_sampled_there_as_well(
    model: Model, kv_unified: bool, n_ubatch: int
) -> None:
    """Where the context has room for so many outputs of a sequence; else the host samples them."""
    how: dict[str, Any] = EXACT | {
        "kv_unified": kv_unified or model.is_hybrid,
        "n_ubatch": n_ubatch,
    }
    if model.is_hybrid:  # drafts are taken back from its snapshots, in a pool
        how["n_rs_seq"] = N_DRAFT
    each = mixed(50)
    with (
        context_of(model, **how) as context,
        Stepper(context, device_sampling=False) as stepper,
    ):
        right = generate(stepper, each, 70, on_device=0)
    device = drafted(model, each, right, device_sampling=True, per_seq=1 + N_DRAFT, **how)
    assert device[1:] == ({1}, {1})
    few = drafted(model, each, right, device_sampling=True, per_seq=1, **how)
    assert few[1:] == ({0}, {1})
    host = drafted(model, each, right, device_sampling=False, per_seq=1 + N_DRAFT, **how)
    assert host[1:] == ({0}, {0})
    assert device[0] == few[0] == host[0]
    for tokens, known in zip(device[0], right, strict=True):
        assert tokens == known[: len(tokens)]
        assert len(tokens) > 12  # of which some were drafted


def test_rows_that_fill_up_leave_a_step_on_the_device(model: Model) -> None:
    """Where a new graph is dear, a step has as many rows as the one before. No sequence gets more
    than it has outputs."""
    how: dict[str, Any] = EXACT | {"kv_unified": True, "n_outputs_max": 2 * (1 + N_DRAFT)}
    if model.is_hybrid:
        how["n_rs_seq"] = N_DRAFT
    with (
        context_of(model, n_outputs_max_per_seq=1 + N_DRAFT, n_seq_max=2, **how) as context,
        Stepper(context, device_sampling=True, n_draft_max=N_DRAFT) as stepper,
    ):
        each = mixed(60)[:2]
        right = generate(stepper, each, 20, on_device=1)
        context.memory.clear()
        tokens = [[begin(stepper, each[seq], prompt(seq, 3 + 7 * seq), seq=seq)] for seq in (0, 1)]
        drafts = stepper.drafts
        assert drafts is not None
        for n in (0, 4, 1):  # the first step begins what is known of drafts
            drafts.n_most[:], drafts.n_given[:] = N_DRAFT * (n > 0), n
            for seq, known in enumerate(tokens):
                drafts.token[seq, :n] = right[seq][len(known) :][:n]
            result = stepper.run([0, 1], 1)
            (step,) = result.steps
            assert (step["on_device"], step["n_drafted"]) == (1, 2 * n)
            assert step["n_rows"] == (2 * (1 + N_DRAFT) if n else 2)
            for seq, token in zip(result.seq.tolist(), result.token.tolist(), strict=True):
                tokens[seq].append(token)
            n_priced = len(drafts.seconds)
            drafts.seconds[:] = drafts.worst[:] = 1 + 0.01 * np.arange(n_priced)
            drafts.n_priced[0], drafts.credit[0], drafts.new_graph[0] = n_priced, 100, 0.5
    assert tokens == [known[: len(got)] for known, got in zip(right, tokens, strict=True)]


def own_chain(kind: str, seq: int) -> Any:
    """Libllama's own samplers, as `kind` names them."""
    made = {
        "top_k": lambda: lib.llama_sampler_init_top_k(5 + 300 * seq),
        "dist": lambda: lib.llama_sampler_init_dist(seq),
        "greedy": lib.llama_sampler_init_greedy,
        "temp": lambda: lib.llama_sampler_init_temp(0.5),
    }
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    for name in kind.split():
        lib.llama_sampler_chain_add(chain, made[name]())
    return chain


def sampled(context: Context, what: str, i: int) -> Any:
    """What libllama says that its samplers gave for row `i`, where it lies."""
    n = getattr(lib, f"llama_get_sampled_{what}_count_ith")(context.ptr, i)
    at = getattr(lib, f"llama_get_sampled_{what}_ith")(context.ptr, i)
    kind = np.int32 if what == "candidates" else np.float32
    return np.frombuffer(ffi.buffer(at, 4 * n), kind) if n else np.empty(0, kind)


@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("n_ubatch", [128, 4])
def test_libllamas_own_samplers_give_each_row_what_is_its_own(
    model: Model, kv_unified: bool, n_ubatch: int
) -> None:
    """Several rows of a sequence, in any order, in several graphs, of chains that change:
    `vendor/patches/verified-rows.patch` keeps what they give one behind the other, as long as it
    is, and `sampler-outputs.patch` whole until it is read."""
    how = EXACT | {"kv_unified": kv_unified, "n_ubatch": n_ubatch, "n_outputs_max": 3 * N_SEQ}
    random = np.random.default_rng(n_ubatch)
    kinds, pos = [""] * N_SEQ, [0] * N_SEQ
    with (
        ExitStack() as at_end,
        context_of(model, n_outputs_max_per_seq=3, **how) as context,
        context_of(model, **how) as plain,
    ):
        for step in range(60):
            for seq in range(N_SEQ):
                if step % 4 == 0 and random.random() < 0.5:
                    kind = random.choice(["", "top_k", "top_k dist", "dist", "greedy", "temp"])
                    kinds[seq], chain = str(kind), ffi.NULL
                    if kind:
                        chain = own_chain(kinds[seq], seq)
                        at_end.callback(lib.llama_sampler_free, chain)
                    assert lib.llama_set_sampler(context.ptr, seq, chain)
            batch = Batch(3 * N_SEQ)
            order = random.permutation(np.repeat(np.arange(N_SEQ), 3)[: random.integers(1, 16)])
            for seq in order.tolist():
                batch.add(int(random.integers(10, 4000)), pos[seq], [seq], logits=True)
                pos[seq] += 1
            context.decode(batch)
            plain.decode(batch)
            lie = []
            for i, seq in enumerate(order.tolist()):
                kind, row = kinds[seq], plain.logits(i)
                ids, logits, probs = (
                    sampled(context, what, i) for what in ("candidates", "logits", "probs")
                )
                lie += [(part.ctypes.data, part.nbytes) for part in (ids, logits, probs)]
                token = lib.llama_get_sampled_token_ith(context.ptr, i)
                if not kind:
                    assert (ids.size, logits.size, probs.size, token) == (0, 0, 0, -1)
                    assert context.logits(i).tolist() == row.tolist()
                    continue
                if "top_k" in kind:
                    best = np.argsort(-row, kind="stable")[: 5 + 300 * seq]
                    assert sorted(ids.tolist()) == sorted(best.tolist())
                else:
                    assert ids.size == 0
                    ids = np.arange(row.size)
                assert logits.tolist() == (row[ids] * (2 if kind == "temp" else 1)).tolist()
                if "dist" in kind:
                    shares = np.exp(logits - logits.max())
                    np.testing.assert_allclose(probs, shares / shares.sum(), rtol=1e-3, atol=1e-7)
                    assert token in ids
                else:
                    assert probs.size == 0
                    assert token == (int(np.argmax(row)) if kind == "greedy" else -1)
            lie = sorted(part for part in lie if part[1])
            assert [at + n for at, n in lie][:-1] == [at for at, _ in lie][1:]
            none_travelled = lib.llama_get_logits(context.ptr) == ffi.NULL
            assert none_travelled == all(kinds[seq] for seq in order)


def test_logits_that_are_asked_for_are_there(model: Model) -> None:
    with context_of(model) as context, Stepper(context, device_sampling=True) as stepper:
        generate(stepper, mixed(1), 2, on_device=1)
        stepper.set_slot(0, SamplingParams(temperature=0))
        context.memory.clear()
        rows = stepper.rows
        rows.token[:2], rows.pos[:2], rows.seq[:2] = 20, 0, (0, 1)
        rows.flags[:2] = (SAMPLE, OUTPUT)
        result = stepper.step(2)
        assert stepper._info.on_device == 0
        assert int(result.token[0]) == int(np.argmax(context.logits(1)))


def test_the_context_is_whole_afterwards(model: Model) -> None:
    """Without the stepper, and beside it."""
    with context_of(model) as context:
        stepper = Stepper(context, device_sampling=True)
        generate(stepper, mixed(1), 2, on_device=1)

        def greedy() -> int:
            context.memory.clear()
            batch = context.batch()
            batch.extend(prompt(0, 9), 0, 0)
            context.decode(batch)
            return int(np.argmax(context.logits(8)))

        beside = greedy()
        context.memory.clear()
        generate(stepper, mixed(1), 2, on_device=1)
        stepper.close()
        assert greedy() == beside
        Stepper(context, device_sampling=True)  # dropped without being closed
        assert greedy() == beside
    stepper = Stepper(context := context_of(model), device_sampling=True)
    generate(stepper, mixed(1), 2, on_device=1)
    context.close()
    stepper.close()


def test_a_small_vocabulary_has_no_room_for_it() -> None:
    with (
        Model.default() as model,
        context_of(model) as context,
        Stepper(context, device_sampling=True) as stepper,
    ):
        generate(stepper, mixed(1), 2, on_device=0)


def test_auto_leaves_a_cpu_alone(model: Model) -> None:
    with context_of(model) as context, Stepper(context) as stepper:
        generate(stepper, mixed(1), 40, on_device=0)


@pytest.mark.parametrize("kv_unified", [True, False])
def test_the_engine_passes_it_on(model: Model, kv_unified: bool) -> None:
    prompts = [prompt(seq, 6 + seq).tolist() for seq in range(8)]
    both = []
    for device_sampling in (True, False):
        own = {"kv_unified": kv_unified, "device_sampling": device_sampling}
        with engine_on(model, n_ctx=512, **own) as engine:
            each = [SamplingParams(max_tokens=20, seed=i, ignore_eog=True) for i in range(8)]
            both.append([result.tokens for result in engine.generate(prompts, each)])
            trace = engine.trace()
            assert {*trace["on_device"][trace["sampled"] > 0].tolist()} == {int(device_sampling)}
    assert both[0] == both[1]


@pytest.mark.parametrize("value", ["yes", 1, None, 0.5])
def test_bad_values(model: Model, value: Any) -> None:
    with context_of(model) as context, pytest.raises(ArgumentError, match="device_sampling"):
        Stepper(context, device_sampling=value)
