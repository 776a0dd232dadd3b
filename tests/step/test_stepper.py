"""The native step against raw libllama: same tokens, same numbers, and errors instead of aborts."""

import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pyllamabatch.errors import (
    ArgumentError,
    ClosedError,
    ContextBusy,
    GrammarError,
    InvalidBatch,
    KvCacheFull,
    NoCandidate,
)
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import OUTPUT, SAMPLE, Finish, Stepper
from tests.support.decoding import begin, generate, write, write_next
from tests.support.models_gguf import EOS, gguf_path
from tests.support.oracle import RawContext, raw_context, raw_model

PROMPT = [1, 270, 280, 290, 300, 310]
OTHER = [1, 320, 330, 340]


def alone(stepper: Stepper, params: SamplingParams, *, seq: int = 0) -> tuple[list[int], Finish]:
    return generate(stepper, params, PROMPT, seq=seq)


def raw_generate(n: int, choose: Callable[[RawContext], int]) -> list[int]:
    settings = {
        "type_k": lib.GGML_TYPE_F32,
        "type_v": lib.GGML_TYPE_F32,
        "flash_attn_type": lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        "n_threads": 1,
    }
    with (
        raw_model(gguf_path("llama")) as raw,
        raw_context(raw, settings=settings, n_ctx=512, n_batch=64) as context,
    ):
        context.feed(PROMPT)
        tokens = [choose(context)]
        while len(tokens) < n:
            context.feed(tokens[-1:], pos=len(PROMPT) + len(tokens) - 1)
            tokens.append(choose(context))
        return tokens


BIAS = {270: 2.0, 280: -math.inf}
CHAINS: list[dict[str, Any]] = [
    {},
    {"repeat_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1, "penalty_last_n": 5},
    {"typical_p": 0.9},
    {"temperature": 0, "repeat_penalty": 1.3},
    {"top_k": 0, "min_p": 0.0},
    {"top_k": 0, "top_p": 1, "min_p": 0},
    {"temperature": 1e38, "top_k": 0, "top_p": 1, "min_p": 0},
]


"""With those of the fused sampler, candidates and probabilities are compared in native/tests."""


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 2])
@pytest.mark.parametrize("options", CHAINS, ids=lambda options: ",".join(options))
def test_seeded_sampling_is_libllamas_own_chain(
    stepper: Stepper, seed: int, options: dict[str, Any]
) -> None:
    given = {"temperature": 1.5, "top_p": 0.98, "min_p": 0.02, "logit_bias": BIAS, **options}
    p = SamplingParams(max_tokens=24, seed=seed, **given)
    bias = ffi.new("llama_logit_bias[]", list(BIAS.items()))
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    for sampler in (
        lib.llama_sampler_init_logit_bias(stepper.n_vocab, len(bias), bias),
        lib.llama_sampler_init_penalties(
            stepper.n_vocab,
            p.penalty_last_n,
            p.repeat_penalty,
            p.frequency_penalty,
            p.presence_penalty,
        ),
        lib.llama_sampler_init_top_k(p.top_k),
        lib.llama_sampler_init_typical(p.typical_p, 0),
        lib.llama_sampler_init_top_p(p.top_p, 0),
        lib.llama_sampler_init_min_p(p.min_p, 0),
        lib.llama_sampler_init_temp_ext(p.temperature, 0, 1),
        lib.llama_sampler_init_dist(seed),
    ):
        lib.llama_sampler_chain_add(chain, sampler)
    for token in PROMPT:
        lib.llama_sampler_accept(chain, token)
    expected = raw_generate(24, lambda c: int(lib.llama_sampler_sample(chain, c.ptr, -1)))
    lib.llama_sampler_free(chain)

    tokens, finish = alone(stepper, p)
    n = len(tokens)
    assert tokens == expected[:n]
    assert finish is (Finish.EOG if tokens[-1] == EOS else Finish.LENGTH)
    assert stepper.slot(0).seed == (seed if p.temperature else None)
    assert len(set(tokens)) > 5 or not p.temperature


def test_which_path(context: Context) -> None:
    grammar = SamplingParams(grammar='root ::= "a"')
    with Stepper(context) as stepper:
        for params, path in (
            (SamplingParams(), "fused"),
            (SamplingParams(temperature=0), "fused"),
            (SamplingParams(repeat_penalty=1.4, logit_bias=BIAS), "fused"),
            (grammar, "chain"),
            (SamplingParams(typical_p=0.9), "chain"),
        ):
            stepper.set_slot(0, params)
            assert stepper.slot(0).path == path
            stepper.copy_slot(0, 1)
            assert stepper.slot(1).path == path
    with Stepper(context, sampler="fused") as stepper, pytest.raises(ArgumentError, match="path"):
        stepper.set_slot(0, grammar)
    with pytest.raises(ArgumentError, match="auto, chain, fused"):
        Stepper(context, sampler="quick")


def test_without_a_seed_draws_differ_and_the_seed_is_known(stepper: Stepper) -> None:
    params = SamplingParams(max_tokens=20, temperature=3.0, top_k=0, top_p=1, min_p=0)
    first, _ = alone(stepper, params)
    seed = stepper.slot(0).seed
    assert seed is not None
    runs = {tuple(first)}
    for _ in range(3):
        stepper._context.memory.clear()  # type: ignore[union-attr]
        runs.add(tuple(alone(stepper, params)[0]))
    assert len(runs) > 1
    stepper._context.memory.clear()  # type: ignore[union-attr]
    again = SamplingParams(max_tokens=20, temperature=3.0, top_k=0, top_p=1, min_p=0, seed=seed)
    assert alone(stepper, again)[0] == first


def log_softmax(logits: Any) -> Any:
    wide = np.asarray(logits, np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_log_probabilities_are_those_of_the_raw_logits(
    stepper: Stepper, context: Context, temperature: float
) -> None:
    params = SamplingParams(
        temperature=temperature, seed=5, logprobs=7, logit_bias={300: 9.0}, repeat_penalty=1.5
    )
    stepper.set_slot(0, params, PROMPT)
    stepper.set_slot(1, SamplingParams(logprobs=0), OTHER)
    stepper.set_slot(2, SamplingParams(), OTHER)
    n = write(stepper, PROMPT)
    n = write(stepper, OTHER, seq=1, at=n)
    result = stepper.step(write(stepper, OTHER, seq=2, at=n))
    assert result.n_top.tolist() == [7, 0, 0]
    for i in range(2):
        expected = log_softmax(context.logits(int(result.row[i])))
        np.testing.assert_allclose(result.logprob[i], expected[result.token[i]], atol=1e-5)
    assert math.isnan(result.logprob[2])
    expected = log_softmax(context.logits(int(result.row[0])))
    best = np.argsort(-expected, kind="stable")[:7]
    assert result.top_token[0, :7].tolist() == best.tolist()
    np.testing.assert_allclose(result.top_logprob[0, :7], expected[best], atol=1e-5)
    assert result.top_token.shape == (3, 20)


def test_more_log_probabilities_than_the_stepper_has_room_for(context: Context) -> None:
    with Stepper(context, n_logprobs_max=3) as stepper:
        stepper.set_slot(0, SamplingParams(logprobs=3))
        with pytest.raises(ArgumentError, match=r"logprobs=4: must be in 0\.\.3"):
            stepper.set_slot(0, SamplingParams(logprobs=4))
    with Stepper(context, n_logprobs_max=0) as stepper:
        tokens, _ = alone(stepper, SamplingParams(max_tokens=3, logprobs=0, seed=1))
        assert len(tokens) == 3
    with pytest.raises(ArgumentError, match="n_logprobs_max"):
        Stepper(context, n_logprobs_max=-1)


def greedy_tokens(stepper: Stepper, n: int = 8) -> list[int]:
    tokens, _ = alone(stepper, SamplingParams(temperature=0, max_tokens=n))
    stepper._context.memory.clear()  # type: ignore[union-attr]
    return tokens


def test_ends(stepper: Stepper, context: Context) -> None:
    """By the budget, a stop token id, or the end of text, which a bias makes certain."""
    free = greedy_tokens(stepper)
    info = stepper.slot(0)
    assert (info.n_generated, info.n_left, info.active) == (8, 0, False)
    assert info.next_pos == len(PROMPT) + 7
    stop = free[3]
    ends: list[tuple[dict[str, Any], tuple[list[int], Finish]]] = [
        ({"max_tokens": 5}, (free[:5], Finish.LENGTH)),
        ({"stop_token_ids": (stop,)}, (free[: free.index(stop) + 1], Finish.STOP)),
        ({"logit_bias": {EOS: 1000.0}}, ([EOS], Finish.EOG)),
        ({"logit_bias": {EOS: 1000.0}, "min_tokens": 3}, ([*free[:3], EOS], Finish.EOG)),
        ({"logit_bias": {EOS: 1000.0}, "ignore_eog": True}, (free, Finish.LENGTH)),
    ]
    for options, expected in ends:
        params = SamplingParams(**{"temperature": 0, "max_tokens": 8, **options})
        assert alone(stepper, params) == expected, options
        context.memory.clear()
    late = SamplingParams(temperature=0, max_tokens=8, min_tokens=1, stop_token_ids=tuple(free))
    assert alone(stepper, late)[0][0] not in free


def test_a_dead_end_is_an_error_of_that_request_only(stepper: Stepper) -> None:
    bias = dict.fromkeys(range(stepper.n_vocab), -math.inf)
    stepper.set_slot(0, SamplingParams(temperature=0, logit_bias=bias), PROMPT)
    stepper.set_slot(1, SamplingParams(temperature=0), OTHER)
    result = stepper.step(write(stepper, OTHER, seq=1, at=write(stepper, PROMPT)))
    assert result.code == 0
    assert result.finish.tolist() == [Finish.ERROR, Finish.NONE]
    assert result.error.tolist() == [lib.PLB_E_NO_CANDIDATE, 0]
    assert result.token[0] == -1
    assert result.token[1] >= 0
    assert isinstance(error := stepper.slot_error(0), NoCandidate)
    assert "no token" in str(error)
    assert not stepper.slot(0).active


@pytest.mark.parametrize(
    ("grammar", "why"), [("root ::= (", "line 1, column 11"), ("root ::= " + 5000 * "(", "nested")]
)
def test_a_bad_grammar_says_why(
    stepper: Stepper, capfd: pytest.CaptureFixture[str], grammar: str, why: str
) -> None:
    stepper.set_slot(0, SamplingParams(seed=9))
    with pytest.raises(GrammarError, match=why):
        stepper.set_slot(0, SamplingParams(grammar=grammar))
    assert stepper.slot(0).seed == 9  # the slot that was there stays
    with pytest.raises(GrammarError, match=why):
        stepper.make_slot(SamplingParams(grammar=grammar))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("column", "value", "limit"),
    [
        ("token", -1, r"0\.\."), ("token", 10**6, r"0\.\."), ("pos", -1, r"0\.\."),
        ("seq", -1, r"0\.\.3"), ("seq", 4, r"0\.\.3"), ("flags", 8, "OUTPUT and SAMPLE"),
        ("seq", 1, "a slot"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_before_libllama(
    stepper: Stepper, context: Context, column: str, value: int, limit: str
) -> None:
    stepper.set_slot(0, SamplingParams(temperature=0))
    n = write(stepper, PROMPT)
    row = n - 1
    getattr(stepper.rows, column)[row] = value
    with pytest.raises(ArgumentError, match=limit) as caught:
        stepper.step(n)
    assert caught.value.argument == f"rows.{column}[{row}]"
    assert caught.value.value == value
    assert context.memory.pos_max(0) == -1
    assert stepper.slot(0).n_generated == 0
    assert stepper.result.n_results == 0


def test_too_many_outputs(model: Model) -> None:
    with (
        Context(model, n_ctx=64, n_batch=16, n_seq_max=2, n_outputs_max=3) as context,
        Stepper(context) as stepper,
    ):
        n = write(stepper, [1, 270, 280, 290])
        stepper.rows.flags[:n] = OUTPUT
        with pytest.raises(ArgumentError, match="n_outputs_max"):
            stepper.step(n)
        stepper.rows.flags[0] = 0
        assert stepper.step(n).code == 0


def test_what_libllama_refuses_changes_no_slot(
    model: Model, capfd: pytest.CaptureFixture[str]
) -> None:
    with Context(model, n_ctx=256, n_batch=64, n_seq_max=1) as context, Stepper(context) as stepper:
        stepper.set_slot(0, SamplingParams(temperature=0, max_tokens=10_000))
        n = write(stepper, PROMPT)
        stepper.rows.pos[n - 1] += 3  # a gap
        result = stepper.step(n)
        assert (result.code, result.n_results) == (-1, 0)
        with pytest.raises(InvalidBatch):
            result.raise_for_code()
        assert stepper.slot(0).n_generated == 0
        result = stepper.step(write(stepper, PROMPT))
        while result.code == 0:
            info = stepper.slot(0)
            result = stepper.step(write_next(stepper, 0))
        with pytest.raises(KvCacheFull):
            result.raise_for_code()
        assert stepper.slot(0) == info
        context.memory.clear()
        assert stepper.step(write(stepper, PROMPT)).code == 0
        assert capfd.readouterr() == ("", "")


def test_a_finished_slot_samples_no_more(stepper: Stepper) -> None:
    alone(stepper, SamplingParams(temperature=0, max_tokens=1))
    with pytest.raises(ArgumentError, match="has not finished"):
        stepper.step(write(stepper, [270], pos=len(PROMPT)))


def test_several_rows_of_one_sequence_sample_in_order(stepper: Stepper, context: Context) -> None:
    """As verifying a draft does: the rows after a finish give no result."""
    alone = greedy_tokens(stepper, 3)
    stepper.set_slot(0, SamplingParams(temperature=0, max_tokens=3), PROMPT)
    feed = [*PROMPT, *alone, 270]
    n = write(stepper, feed)
    stepper.rows.flags[len(PROMPT) - 1 : n] = SAMPLE
    result = stepper.step(n)
    assert result.token.tolist() == alone
    assert result.index.tolist() == [0, 1, 2]
    assert result.finish.tolist() == [0, 0, Finish.LENGTH]


def test_copy_slot_forks_draws_penalties_and_grammar(stepper: Stepper, context: Context) -> None:
    params = SamplingParams(
        seed=11, temperature=2.0, max_tokens=12, repeat_penalty=1.4, grammar="root ::= [ -~]*"
    )
    stepper.set_slot(0, params, PROMPT)
    result = stepper.step(write(stepper, PROMPT))
    for dst, seed in ((1, None), (2, 77)):
        stepper.copy_slot(0, dst, seed=seed)
        context.memory.seq_cp(0, dst)
    assert stepper.slot(1) == stepper.slot(0)
    assert stepper.slot(2).seed == 77
    tokens: list[list[int]] = [[], [], []]
    while result.code == 0 and all(stepper.slot(seq).active for seq in range(3)):
        for seq in range(3):
            write_next(stepper, seq, at=seq)
        result = stepper.step(3)
        for seq, token in zip(result.seq, result.token, strict=True):
            tokens[seq].append(int(token))
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]
    assert len(tokens[0]) > 2


def test_a_slot_taken_out_goes_on_under_another_sequence(
    stepper: Stepper, context: Context
) -> None:
    params = SamplingParams(seed=4, temperature=1.5, max_tokens=10, ignore_eog=True)
    expected, _ = alone(stepper, params)
    context.memory.clear()

    stepper.set_slot(0, params, PROMPT)
    tokens = [int(stepper.step(write(stepper, PROMPT)).token[0])]
    slot = stepper.take_slot(0)
    with pytest.raises(ArgumentError, match="a slot"):
        stepper.slot(0)
    context.memory.seq_rm(0)
    stepper.put_slot(3, slot)
    with pytest.raises(ArgumentError, match="was not put back"):
        stepper.put_slot(2, slot)
    result = stepper.step(write(stepper, [*PROMPT, *tokens], seq=3))  # recomputed
    while True:
        tokens.append(int(result.token[0]))
        if not stepper.slot(3).active:
            break
        result = stepper.step(write_next(stepper, 3))
    assert tokens == expected


def test_a_slot_that_can_not_be_put_leaves_what_is_there(stepper: Stepper, model: Model) -> None:
    stepper.set_slot(1, SamplingParams(seed=9))
    slot = stepper.make_slot(SamplingParams())
    for next_row, words in (
        ((10**6, 3), r"next_row\[0\]=1000000: must be in 0\.\."),
        ((2**40, 0), r"next_row\[0\]=1099511627776"),
        ((1, -1), r"next_row\[1\]=-1"),
    ):
        with pytest.raises(ArgumentError, match=words):
            stepper.put_slot(1, slot, next_row)
    with Context(model, n_ctx=64) as other, Stepper(other, n_logprobs_max=40) as wide:
        more = wide.make_slot(SamplingParams(logprobs=40))
    with pytest.raises(ArgumentError, match=r"slot=.*logprobs of at most 20"):
        stepper.put_slot(1, more)
    assert stepper.slot(1).seed == 9
    stepper.put_slot(1, slot, (5, 3))
    assert stepper.slot(1).next_token == 5


@pytest.mark.parametrize("path", ["chain", "fused"])
def test_a_slot_that_is_made_beside_a_smaller_context_looks_back_as_far(
    model: Model, path: str
) -> None:
    """It is made before the context grows for it."""
    params = SamplingParams(
        temperature=0, penalty_last_n=-1, presence_penalty=50.0, max_tokens=8, ignore_eog=True
    )
    prompt = [1, *range(20, 220), *[300] * 300]
    tokens = []
    with (
        Context(model, n_ctx=1024, n_batch=64) as context,
        Stepper(context, sampler=path) as stepper,
    ):
        for n_ctx in (1024, 256):
            resize(context, n_ctx)
            slot = stepper.make_slot(params, prompt)
            resize(context, 1024)
            stepper.put_slot(0, slot)
            for pos in range(0, len(prompt), 64):
                part = prompt[pos : pos + 64]
                n = write(stepper, part, pos=pos)
                stepper.rows.flags[n - 1] *= pos + n == len(prompt)
                result = stepper.step(n)
            tokens.append([int(result.token[0]), *stepper.run([0], 6).token.tolist()])
    assert tokens[0] == tokens[1]


def resize(context: Context, n_ctx: int) -> None:
    """As an engine's pool is while it is idle, and when it is needed again."""
    context._native.n_ctx = n_ctx
    context.renew()
    assert context.n_ctx == n_ctx


def test_make_slot_works_while_another_thread_is_inside(stepper: Stepper, context: Context) -> None:
    made: list[Any] = []
    params = SamplingParams(temperature=0, grammar="root ::= .*")
    with context.exclusive():
        thread = threading.Thread(target=lambda: made.append(stepper.make_slot(params, PROMPT)))
        thread.start()
        thread.join()
    stepper.put_slot(0, made[0])
    assert stepper.slot(0).active


@pytest.mark.parametrize(
    ("use", "words"),
    [
        *[(lambda s, n=n: s.step(n), r"n_rows.*1\.\.64") for n in (0, -1, 65, 2**40, -(2**40))],
        (lambda s: s.set_slot(-1, SamplingParams()), r"seq_id=-1.*0\.\.3"),
        (lambda s: s.clear_slot(4), r"seq_id=4.*0\.\.3"),
        (lambda s: s.copy_slot(0, 10**6), r"dst.*0\.\.3"),
        (lambda s: s.copy_slot(-1, 0), r"src=-1.*0\.\.3"),
        (lambda s: s.take_slot(4), r"seq_id=4.*0\.\.3"),
        (lambda s: s.slot(-1), r"seq_id=-1.*0\.\.3"),
        (lambda s: s.copy_slot(0, 1, seed=-1), "seed=-1"),
        (lambda s: s.set_slot(0, SamplingParams(), [s.n_vocab]), r"prompt_tokens\[0\]"),
        (lambda s: s.set_slot(0, SamplingParams(), [5, -1]), r"prompt_tokens\[1\]"),
        (lambda s: s.set_slot(0, SamplingParams(), [2**40]), r"prompt_tokens\[0\]"),
        (lambda s: s.set_slot(0, SamplingParams(), [[1, 2]]), "prompt_tokens"),
        (lambda s: s.set_slot(0, SamplingParams(logit_bias={s.n_vocab: 1.0})), "token"),
        (lambda s: s.set_slot(0, SamplingParams(stop_token_ids=(s.n_vocab,))), "token"),
    ],
)
def test_arguments_are_checked(
    stepper: Stepper, use: Callable[[Stepper], object], words: str
) -> None:
    stepper.set_slot(0, SamplingParams(seed=9))
    with pytest.raises(ArgumentError, match=words):
        use(stepper)
    assert stepper.slot(0).seed == 9  # the slot that was there stays


def test_closed_things_say_so(context: Context) -> None:
    stepper = Stepper(context)
    stepper.close()
    stepper.close()
    for call in (
        lambda: stepper.step(1),
        lambda: stepper.set_slot(0, SamplingParams()),
        lambda: stepper.slot(0),
        lambda: stepper.last_error,
    ):
        with pytest.raises(ClosedError, match="stepper"):
            call()


def test_a_slots_tokens_outlive_its_stepper(model: Model) -> None:
    context = Context(model, n_ctx=64)
    stepper = Stepper(context)
    slot = stepper.make_slot(SamplingParams(temperature=0, max_tokens=20, ignore_eog=True))
    stepper.put_slot(0, slot, (3, 0))
    stepper.run([0], 16)
    tokens, engine = slot.tokens(), weakref.ref(stepper._engine)
    context.close()
    del stepper, context
    assert engine() is not None  # else what it points to is freed
    assert slot.tokens().tolist() == tokens.tolist()
    del slot
    assert engine() is None


def test_a_slot_keeps_the_model_that_it_is_of(model: Model) -> None:
    with Context(model, n_ctx=64) as context, Stepper(context) as stepper:
        other = Model(model.path)
        held = weakref.ref(other.ptr)
        with Context(other, n_ctx=64) as others, Stepper(others) as made:
            slot = made.make_slot(SamplingParams())
        other.close()
        assert held() is not None  # else another model may come to lie where it was
        with pytest.raises(ArgumentError, match="of this model"):
            stepper.put_slot(0, slot)
        del slot
        assert held() is None


def test_closing_the_context_first_is_fine(model: Model) -> None:
    context = Context(model, n_ctx=64, n_seq_max=2)
    stepper = Stepper(context)
    stepper.set_slot(0, SamplingParams(grammar="root ::= .*"))
    n = write(stepper, PROMPT)
    context.close()
    with pytest.raises(ClosedError, match="context"):
        stepper.step(n)
    slot_rows = stepper.rows
    stepper.close()
    del stepper
    gc.collect()
    slot_rows.token[:] = 7  # the views outlive the stepper
    assert (slot_rows.token == 7).all()


def test_one_thread_at_a_time(stepper: Stepper, context: Context) -> None:
    stepper.set_slot(0, SamplingParams(temperature=0))
    n = write(stepper, PROMPT)
    errors: list[BaseException] = []

    def intrude(use: Callable[[], object]) -> None:
        try:
            use()
        except ContextBusy as error:
            errors.append(error)

    with context.exclusive():
        for use in (lambda: stepper.step(n), stepper.close):
            thread = threading.Thread(target=intrude, args=(use,))
            thread.start()
            thread.join()
        assert len(errors) == 2
        assert stepper.step(n).code == 0  # the owner may


def test_after_a_step_no_copy_waits(model: Model) -> None:
    with (
        Context(model, n_ctx=512 * 2, n_seq_max=2, kv_unified=False, n_threads=1) as context,
        Stepper(context) as stepper,
    ):
        token = begin(stepper, SamplingParams(temperature=0), PROMPT)
        context.memory.seq_cp(0, 1)
        context.memory.seq_rm(1)
        assert context.memory.is_copying(1)
        stepper.run([0], 1).raise_for_code()
        assert not context.memory.is_copying(1)
        context.state_seq_set(context.state_seq_get(0, tokens=[*PROMPT, token]), 1)
        assert context.memory.pos_max(1) == len(PROMPT)
