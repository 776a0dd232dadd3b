"""A sequence as bytes: what its cells hold, its tokens, and where its sampling was.

What is saved continues as the original would have: the draws, the penalties, the grammar, the
budget and the minimum length are where they were. Not saved: the logits of the last row (the next
step makes new ones), the log-probabilities that were handed out, the text of a half character
(detokenize the tokens again), who waits for it, and a LoRA's weights (its file name and scale are
compared). The number of threads, the backend and the batch sizes may differ; they move logits in
their last bits, as a neighbour does.

A checksum finds damage, not forgery: numbers that were put into cells on purpose can spoil answers.
Restore what you have saved."""

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import StateError, integer
from ..llama import state
from ..llama.context import Context
from ..llama.grammar import Grammar
from ..llama.lora import LoraNames
from ..llama.model import Model
from ..llama.vocab import TokenArray, Tokens
from ..scheduler.invariance import Computed
from ..step.sampling_params import SamplingParams
from ..step.stepper import DetachedSlot, Stepper

MOST = 2**31 - 1
DRAWS_MAX = 16  # random numbers for each token, more than any takes


@dataclass(frozen=True)
class Saved:
    """What a snapshot says of its sequence.

    `tokens`: all that it knew, int32; the first `n_prompt` were given to it, the others sampled.
    `n_computed`: how many of them the state holds. `params`: None without a sampling state;
    `params.seed` is the one in use. `n_draws`: random numbers that it had taken. `loras`: file
    names and scales of the adapters that it was computed with. `how`: how its tokens were computed,
    where a batch-invariant engine did."""

    tokens: TokenArray
    n_prompt: int
    n_computed: int
    params: SamplingParams | None = None
    n_draws: int = 0
    loras: tuple[tuple[str, float], ...] = ()
    how: Computed | None = None


def save(
    context: Context,
    stepper: Stepper,
    seq_id: int,
    tokens: Tokens,
    params: SamplingParams | None,
    n_prompt: int,
    loras: LoraNames,
    how: Computed | None,
) -> bytes:
    """`tokens`: all that the sequence knows, the one that was sampled last included; `n_prompt` of
    them were not sampled. With `params`, which its slot was made of, the sampling state goes along.
    `loras`: as in `Context.state_seq_get`. `how`: see `Saved`. Between two steps. Raises
    UnsupportedOperation and StateError as `Context.state_seq_get`."""
    note: dict[str, Any] = {"n_prompt": n_prompt, "n_computed": context.memory.pos_max(seq_id) + 1}
    if params is not None:
        info = stepper.slot(seq_id)
        sampling = asdict(params)
        sampling["seed"] = info.seed if info.seed is not None else params.seed
        sampling["logit_bias"] = sorted(params.logit_bias.items())
        note["sampling"], note["n_draws"] = sampling, info.n_draws
    if how is not None:
        note["how"] = asdict(how)
    return context.state_seq_get(seq_id, loras, tokens=tokens, note=note)


def read(model: Model, data: bytes) -> Saved:
    """What a snapshot is of. StateError when it is damaged or of another model."""
    tokens, note = state.read_note(model, data)
    if "n_prompt" not in note:
        raise StateError("a plain state: Context.state_seq_set restores it")
    try:
        return _saved(tokens, note)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise StateError(f"its note is not of this version: {error!r}") from None


def _saved(tokens: TokenArray, note: dict[str, Any]) -> Saved:
    n_tokens, params, sampling = len(tokens), None, note.get("sampling")
    n_prompt = integer("n_prompt", note["n_prompt"], 1, n_tokens)
    n_computed = integer("n_computed", note["n_computed"], 0, n_tokens)
    if sampling is not None:
        sampling["logit_bias"] = dict(sampling.get("logit_bias", ()))
        if isinstance(sampling.get("grammar"), dict):
            sampling["grammar"] = Grammar.of(sampling["grammar"])
        params = SamplingParams(**sampling)
    n_draws = integer("n_draws", note.get("n_draws", 0), 0, DRAWS_MAX * n_tokens)
    loras = tuple((str(name), float(scale)) for name, scale in note["context"]["loras"])
    how = _how(note["how"], n_tokens) if "how" in note else None
    return Saved(tokens, n_prompt, n_computed, params, n_draws, loras, how)


def _how(fields: dict[str, Any], n_tokens: int) -> Computed:
    how = Computed(**fields)
    integer("grid", how.grid, 1, MOST)
    integer("shared", how.shared, 0, n_tokens)
    integer("high", how.high, 0, n_tokens)
    at = integer("on_grid", how.on_grid, 0, how.high)
    for i, (start, end) in enumerate(how.chunks):
        integer("start", start, at, how.high - 1)
        at = integer("end", end, start + 1, min(start + how.grid, how.high))
        how.chunks[i] = start, end
    return how


def slot_of(stepper: Stepper, saved: Saved) -> DetachedSlot | None:
    """Its sampling state as a slot to put under a sequence id; None when there is none."""
    if saved.params is None:
        return None
    prompt, sampled = saved.tokens[: saved.n_prompt], saved.tokens[saved.n_prompt :]
    slot = stepper.make_slot(saved.params, prompt)
    if len(sampled):
        stepper.replay(slot, sampled, saved.n_draws, len(saved.tokens) - 1)
    return slot
