"""DraftModel: a second, smaller model, or layers of the first one, that drafts for a stepper.

draft = DraftModel(Model("small.gguf"), stepper, n_ctx=4096)
draft.begin(0, tokens)          # sequence 0 has a slot, and knows these tokens
stepper.drafts.n_most[0] = 4
draft.draft([0])                # fills in stepper.drafts.token and n_given
stepper.run([0], 1)             # checks them

draft.attach()                  # or the stepper does it before each of its steps
stepper.run([0], 32)"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import ArgumentError, ClosedError, UnsupportedOperation, decode_error
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.handle import owned
from pyllamabatch.llama.memory import copies_whole_only
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.runtime import text
from pyllamabatch.llama.vocab import TokenArray, Vocab
from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.stepper import Stepper

SIZE_DIFFERS = 128  # tokens at most: llama.cpp's SPEC_VOCAB_MAX_SIZE_DIFFERENCE
FIRST_COMPARED = 5  # llama.cpp's SPEC_VOCAB_CHECK_START_TOKEN_ID: those before are often renamed

Slots = npt.NDArray[np.int32] | Sequence[int]


class DraftModel:
    """Drafts are the model's most likely tokens. All sequences are drafted for in the same calls of
    the model, and its memory follows what the target's steps keep.

    - model: its vocabulary is the target's (`check_same_vocabulary`). It stays the caller's.
      target: has `n_draft_max`. Both belong to one thread, and the target is closed
      after this.
    - n_ctx: cells for all sequences together. params: of the `Context` that it is given. With
      ctx_type="mtp" `model` is the target's own, loaded with load_mtp, and its layers that predict
      further tokens draft.

    UnsupportedOperation for a model with a recurrent state, which can't take back the tokens of
    several steps."""

    def __init__(self, model: Model, target: Stepper, *, n_ctx: int, **params: Any) -> None:
        if target.drafts is None:
            raise ArgumentError("target", target, "must be a stepper with n_draft_max of 1 or more")
        self._vocab = target.model.vocab
        check_same_vocabulary(model.vocab, self._vocab)
        if copies_whole_only(model) and params.get("ctx_type") != "mtp":
            raise UnsupportedOperation(
                f"{model.architecture} can't draft: it keeps a recurrent state, from which tokens "
                "of several steps can't be taken back"
            )
        n_seq_max = target.n_seq_max
        given = {"n_seq_max": n_seq_max, "n_outputs_max": n_seq_max, "kv_unified": True}
        self._context = Context(model, n_ctx=n_ctx, **given | {"swa_full": True} | params)
        try:
            self._stepper = Stepper(self._context, n_logprobs_max=0, device_sampling=False)
            out = ffi.new("plb_draft_model **")
            with self._context.exclusive():
                code = lib.plb_draft_model_new(self._stepper._engine, target._engine, out)
            if code:
                raise UnsupportedOperation(
                    f"this model can't draft: {text(lib.plb_code_text(code))}"
                )
        except BaseException:
            self._context.close()
            raise
        self._native = owned(
            out[0], self._stepper._engine, target._engine, free=lib.plb_draft_model_free
        )
        self._exclusive = self._context.exclusive()

    def begin(self, slot: int, tokens: TokenArray) -> None:
        """The sequence in `slot` has its sampler, and knows these tokens: its prompt, and what was
        sampled. ArgumentError for a sequence without a slot, and for no tokens."""
        native, seq = self._open(), self._stepper._seq(slot, "slot")
        ids = self._vocab.check_tokens(tokens)
        if not len(ids):
            raise ArgumentError("tokens", tokens, "must be at least one")
        pointer = ffi.from_buffer("llama_token[]", ids)
        code = lib.plb_draft_model_begin(native, seq, pointer, len(ids))
        if code == lib.PLB_E_MEMORY:
            raise MemoryError("no memory for the tokens of a sequence")
        if code:
            raise ArgumentError("slot", slot, text(lib.plb_code_text(code)))

    def end(self, slot: int) -> None:
        """It needs no drafts any more. What this model has of it may serve the next sequence."""
        lib.plb_draft_model_end(self._open(), self._stepper._seq(slot, "slot"))

    def draft(self, slots: Slots) -> None:
        """Drafts for the target's next run of these slots, as many tokens of each as
        `Drafts.n_most` says. A sequence of which it lacks much catches up first, which may take
        several calls. Raises what a decode raises: KvCacheFull when sequences were given up for
        want of cells; for any other reason none of these has drafts until it begins again."""
        native, seqs = self._open(), self._stepper._seqs(slots)
        with self._exclusive:
            code = lib.plb_draft_model_draft(native, ffi.from_buffer("int32_t[]", seqs), len(seqs))
        if code in (lib.PLB_E_ARGUMENT, lib.PLB_E_SEQ, lib.PLB_E_SEQ_TWICE):
            raise ArgumentError("slots", slots, text(lib.plb_code_text(code)))
        if code == lib.PLB_E_MEMORY:
            raise MemoryError("no memory for drafts")
        if code:
            raise decode_error(code, self._stepper.last_error)

    def attach(self) -> None:
        """From now on the target's runs ask it before each step, without a word of Python. What
        `draft` would raise is `plb_run_info.draft_code` then."""
        lib.plb_draft_model_attach(self._open(), 1)

    def close(self) -> None:
        """Free its memory. Twice is fine."""
        self._native = None
        self._stepper.close()
        self._context.close()

    def _open(self) -> Any:
        if self._native is None:
            raise ClosedError("the draft model is closed")
        return self._native


def check_same_vocabulary(draft: Vocab, target: Vocab) -> None:
    """`ArgumentError` with the first difference. As for llama.cpp, one of the two may have up to
    SIZE_DIFFERS more tokens, and those before FIRST_COMPARED may have other names. Which of them
    begin or end a text need not agree."""

    def refuse(value: object, limit: str) -> ArgumentError:
        return ArgumentError("draft model", value, f"{limit}: its vocabulary must be the model's")

    if abs(draft.n_tokens - target.n_tokens) > SIZE_DIFFERS:
        raise refuse(f"{draft.n_tokens} tokens", f"the model has {target.n_tokens}")
    if draft.type != target.type:
        raise refuse(f"a tokenizer of type {draft.type}", f"the model has {target.type}")
    token = lib.plb_vocab_differs(draft.ptr, target.ptr, FIRST_COMPARED)
    if token >= 0:
        mine, other = (
            text(lib.llama_vocab_get_text(vocab.ptr, token)) for vocab in (draft, target)
        )
        raise refuse(f"token {token} is {mine!r}", f"in the model it is {other!r}")
