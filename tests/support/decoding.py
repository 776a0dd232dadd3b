"""What many tests do: decode tokens, write rows for a stepper, generate one request alone."""

import atexit
import functools
from collections.abc import Collection, Sequence

import numpy as np

from pyllamabatch.llama.batch import Batch
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.vocab import Tokens
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import SAMPLE, Finish, Stepper
from pyllamabatch.step.types import F32
from tests.support.models_gguf import gguf_path
from tests.support.models_special import mimo2_path, qwen35_path


@functools.cache
def loaded(architecture: str) -> Model:
    """The tiny model of an architecture. Not to be closed: all tests share it."""
    model = Model(gguf_path(architecture))
    atexit.register(model.close)
    return model


@functools.cache
def with_mtp() -> Model:
    """A tiny model with a layer that predicts further tokens, loaded. All tests share it."""
    model = Model(mimo2_path(), load_mtp=True)
    atexit.register(model.close)
    return model


@functools.cache
def recurrent_with_mtp(right: bool = True) -> Model:
    """The same, with a layer that keeps a state. `right`: what it predicts is often right, for the
    next token depends mostly on the last one."""
    model = Model(qwen35_path(0.02 if right else 1.0), load_mtp=True)
    atexit.register(model.close)
    return model


def decode(context: Context, tokens: Sequence[int], pos: int = 0, seq: int = 0) -> F32:
    """Decode tokens of one sequence; a copy of the last row's logits."""
    batch = Batch(len(tokens))
    batch.extend(tokens, pos, seq)
    context.decode(batch)
    return np.array(context.logits())


def likeliest(
    context: Context,
    prompt: Sequence[int],
    n: int,
    *,
    never: Collection[int] = (),
    ends: Collection[int] = (),
) -> list[int]:
    """The `n` greedy tokens of a prompt that is alone, none of `never`; the first of `ends` is the
    last one."""
    context.memory.clear()
    logits, tokens = decode(context, prompt), list[int]()
    while True:
        logits[list(never)] = -np.inf
        tokens.append(int(logits.argmax()))
        if len(tokens) == n or tokens[-1] in ends:
            return tokens
        logits = decode(context, tokens[-1:], pos=len(prompt) + len(tokens) - 1)


def write(stepper: Stepper, tokens: Tokens, *, seq: int = 0, pos: int = 0, at: int = 0) -> int:
    """Rows of a sequence from row `at` on, the last one sampled; returns the row after them."""
    rows, end = stepper.rows, at + len(tokens)
    rows.token[at:end] = tokens
    rows.pos[at:end] = np.arange(pos, pos + len(tokens))
    rows.seq[at:end] = seq
    rows.flags[at:end] = 0
    rows.flags[end - 1] = SAMPLE
    return end


def write_next(stepper: Stepper, seq: int, at: int = 0) -> int:
    """The row that a sequence which has sampled goes on with; returns the row after it."""
    info = stepper.slot(seq)
    return write(stepper, [info.next_token], seq=seq, pos=info.next_pos, at=at)


def begin(stepper: Stepper, params: SamplingParams, prompt: Tokens, *, seq: int = 0) -> int:
    """A sequence with its prompt computed; its first token."""
    stepper.set_slot(seq, params, prompt)
    result = stepper.step(write(stepper, prompt, seq=seq))
    result.raise_for_code()
    return int(result.token[0])


def generate(
    stepper: Stepper, params: SamplingParams, prompt: Sequence[int], *, seq: int = 0
) -> tuple[list[int], Finish]:
    stepper.set_slot(seq, params, prompt)
    result = stepper.step(write(stepper, prompt, seq=seq))
    tokens: list[int] = []
    while True:
        result.raise_for_code()
        finish = Finish(result.finish[0])
        if finish is not Finish.ERROR:
            tokens.append(int(result.token[0]))
        if finish:
            return tokens, finish
        result = stepper.step(write_next(stepper, seq))
