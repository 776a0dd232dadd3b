"""The options of a `Stepper`, and the native parameters that they are."""

from typing import Any, TypedDict

from pyllamabatch.errors import (
    ArgumentError,
    UnsupportedOperation,
    choice,
    integer,
    unknown_keyword,
)
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.host import MAX_THREADS, usable_cores
from pyllamabatch.llama.runtime import text
from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.native import PATHS, device_sampling_of, gap_max_of
from pyllamabatch.step.sampling_params import LOGPROBS_MAX

DRAFTERS: dict[str, int] = {"ngram": lib.PLB_DRAFTER_NGRAM}
DRAFT_LIMIT: int = lib.PLB_DRAFT_LIMIT
CORPUS_LIMIT = 2**26  # tokens
SAMPLING_THREADS = 32  # more than a memory bus feeds


class StepperOptions(TypedDict, total=False):
    """What a `Stepper` may be given beside its context.

    - n_logprobs_max: the largest `SamplingParams.logprobs` that a slot may ask for, 20.
    - n_threads: threads that sample, the caller's included; 0, the default, takes the cores that
      the process may use, 32 at most. They sleep while nothing is sampled.
    - n_steps_max: the most steps of one `run`, 32; memory for their results is set aside.
    - sampler: "auto" samples with the fused sampler where it can and else with libllama's own
      chain, "chain" always with that, "fused" refuses what it cannot (grammar, typical_p). The
      tokens are the same (native/sampling/fused.hpp says where not); `SlotInfo.path` tells it.
    - device_sampling: True lets the device choose the 128 largest logits of each row, where a step
      asks for no more (greedy, or a smaller top_k without penalties, biases and log-probabilities),
      so that whole rows need not travel; "auto", the default, where that is measured to be faster,
      never on a CPU. The tokens are the same but for the order of equal logits;
      `steps["on_device"]` tells.
    - gap_max: where every sequence has a stream of cells of its own (kv_unified=False), libllama
      computes at once only sequences whose ids follow each other. So many unused sequences in a row
      get a row of their own in such a step, so that it is not cut in two: default 16 on a device,
      where a row costs little beside reading the weights again, 1 on a CPU, 0 for a unified cache.
      `steps["n_filled"]` tells how many there were.
    - n_draft_max: tokens of a sequence that a step of a run may check beside its next one
      (`Stepper.drafts` says which), from 0, the default, to DRAFT_LIMIT. The context needs outputs
      for all rows of such a step, and one of a model with a recurrent state n_rs_seq=n_draft_max
      and kv_unified=True. With n_outputs_max_per_seq=1+n_draft_max the device samples these, too.
    - drafter: "ngram" lets the stepper draft these tokens itself, from what the sequence's own
      tokens were followed by before; None: only what is given. n_corpus: so many tokens of slots
      that were cleared or replaced stay for that, too; 0, the default: none.
    - sync: wait for the device at every step, also when no row has an output; for exact timings."""

    n_logprobs_max: int
    n_threads: int
    n_steps_max: int
    sampler: str
    device_sampling: bool | str
    gap_max: int | None
    n_draft_max: int
    drafter: str | None
    n_corpus: int
    sync: bool


def engine_params(context: Context, options: StepperOptions) -> Any:
    """The `plb_engine_params` of a stepper on `context`. Raises as `Stepper`."""
    for name in options.keys() - StepperOptions.__annotations__.keys():
        given: Any = options
        raise unknown_keyword(name, given[name], StepperOptions.__annotations__)
    if context.model._no_alloc:
        raise UnsupportedOperation("the model was loaded with no_alloc: it has no weights")

    def count(name: str, value: int, low: int, high: int) -> int:
        return integer(name, options.get(name, value), low, high)

    params = ffi.new("plb_engine_params *")
    params.n_outputs_max = context.n_outputs_max
    params.n_outputs_per_seq = context.params["n_outputs_max_per_seq"]
    params.all_outputs = bool(context.params["embeddings"])
    params.n_logprobs_max = count("n_logprobs_max", 20, 0, LOGPROBS_MAX)
    params.n_steps_max = count("n_steps_max", 32, 1, 65536)
    params.n_draft_max = count("n_draft_max", 0, 0, DRAFT_LIMIT)
    can = context.capabilities
    if params.n_draft_max > (DRAFT_LIMIT if can.partial_removal else can.max_rollback):
        raise UnsupportedOperation(text(lib.plb_code_text(lib.PLB_E_ROLLBACK)))
    n_threads = count("n_threads", 0, 0, MAX_THREADS)
    params.n_threads = n_threads or min(usable_cores(), SAMPLING_THREADS)
    params.device_sampling = device_sampling_of(options.get("device_sampling", "auto"))
    params.mtp = context.params["ctx_type"] == lib.LLAMA_CONTEXT_TYPE_MTP
    params.gap_max = _gap_max(context, options.get("gap_max"), mtp=bool(params.mtp))
    drafter = options.get("drafter")
    if drafter is not None:
        params.drafter = DRAFTERS[choice("drafter", drafter, DRAFTERS)]
    params.n_corpus = count("n_corpus", 0, 0, CORPUS_LIMIT)
    params.sync = bool(options.get("sync", False))
    return params


def _gap_max(context: Context, given: int | None, *, mtp: bool) -> int:
    if mtp and given:
        limit = "0 on a context of layers that predict: what fills up has no hidden states"
        raise ArgumentError("gap_max", given, limit)
    default = 0 if mtp else gap_max_of(context)
    return integer("gap_max", default if given is None else given, 0, 256)


def sampler_path(options: StepperOptions) -> int:
    """The `plb_path` of the `sampler` option."""
    return int(PATHS[choice("sampler", options.get("sampler", "auto"), PATHS)])
