"""Feeds: how drafts come to the steps of an engine, from the drafter that it was given."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..llama.context import default_threads
from ..llama.host import PathLike
from ..llama.model import Model
from ..models import default_draft_path
from ..planner.residency import Beside, fitting_n_ctx
from ..scheduler import Step
from ..step.draft_model import DraftModel, check_same_vocabulary
from ..step.stepper_options import DRAFT_LIMIT
from ..step.types import DraftColumns, Run
from .drafters import AnyDrafter, Draft, Drafter, Mtp, Ngram, Wanted
from .request import Request

log = logging.getLogger(__name__)

BATCH = 512  # rows of a call of a draft model: what it catches up with in a step at most


class Feed:
    """What the core tells of its sequences, between two native calls. This one needs nothing of
    that: there are no drafts, or the native step finds them itself."""

    each_step = False  # whether `fill` has to be called before each step with drafts
    is_over = False  # there will be no drafts any more
    size = 0.0  # of a draft model, as a share of the model's

    def begin(self, slot: int, request: Request) -> None:
        """A request has this slot, and its sampler is there."""

    def leave(self, slot: int) -> None:
        """It has it no more."""

    def ended(self, id: int) -> None:
        """A request is over."""

    def look(self) -> None:
        """Drafts are about to be looked at."""

    def fill(self, step: Step, request_in: Callable[[int], Request]) -> None:
        """Before a call, whose `DraftColumns.n_most` is there."""

    def computed(self, run: Run) -> None:
        """After a call."""

    def close(self) -> None:
        """Before the stepper is closed."""


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A draft model that has no context yet.

    - own: it was loaded for this engine, and is closed with it. layers: the share of its layers
      that it computes. size: see `Feed`. n_ctx: as in `Draft`."""

    model: Model
    own: bool
    layers: float
    size: float
    n_ctx: int

    def context(self, n_seq_max: int) -> Beside:
        """Its context, for an engine's with so many sequences."""
        if 0 < self.n_ctx < n_seq_max:
            name = "Mtp.n_ctx" if self.layers < 1 else "Draft.n_ctx"
            limit = f"must hold a token of each sequence, n_seq_max={n_seq_max}"
            raise ArgumentError(name, self.n_ctx, limit)
        rows = max(BATCH, n_seq_max)
        params: dict[str, Any] = {"n_batch": rows, "n_ubatch": rows, "n_seq_max": n_seq_max}
        params |= {"n_outputs_max": n_seq_max, "kv_unified": True, "swa_full": True}
        if self.layers < 1:
            params["ctx_type"] = "mtp"

        def cells(n_cells: int) -> int:
            return self.n_ctx or -(-(n_cells + n_seq_max * DRAFT_LIMIT) // 256) * 256

        return Beside(self.model, cells, params)

    def close(self) -> None:
        if self.own:
            self.model.close()


class ModelFeed(Feed):
    """Of a draft model that the native step asks by itself, with a context for so many sequences
    and cells as the stepper has. params: of the engine's context. It hears of a sequence when
    drafts are looked at, and at once where it reads what the target computes."""

    def __init__(self, loaded: LoadedDraft, stepper: Any, n_cells: int, params: Any) -> None:
        context = loaded.context(stepper.n_seq_max)
        cells, shrink = context.cells(n_cells), not loaded.n_ctx
        given = dict(context.params)
        if params["n_threads"] != default_threads(stepper.model, params)[0]:  # asked for
            given |= {name: params[name] for name in ("n_threads", "n_threads_batch")}
        cells = fitting_n_ctx(loaded.model, cells, shrink=shrink, **given)
        self._draft = DraftModel(loaded.model, stepper, n_ctx=cells, **given)
        self.size = loaded.size
        self._loaded = loaded
        self._code = 0  # the last one that was told
        self._new: dict[int, Request] = {}  # by slot: it has not heard of these
        self._draft.attach()

    def begin(self, slot: int, request: Request) -> None:
        if request.budget is not None:
            self._new[slot] = request
        if self._loaded.layers < 1:
            self.look()

    def leave(self, slot: int) -> None:
        if self._new.pop(slot, None) is None:
            self._draft.end(slot)

    def look(self) -> None:
        while self._new:
            slot, request = self._new.popitem()
            self._draft.begin(slot, request.known())

    def fill(self, step: Step, request_in: Callable[[int], Request]) -> None:
        if step.drafts:
            self.look()

    def computed(self, run: Run) -> None:
        if run.draft_code:
            why = "has no cells for all" if run.draft_code == 1 else f"failed: {run.draft_code}"
            level = logging.DEBUG if run.draft_code == self._code else logging.WARNING
            log.log(level, "the draft model %s; some sequences go on without drafts", why)
            self._code = run.draft_code

    def close(self) -> None:
        self._draft.close()
        self._loaded.close()


class PythonFeed(Feed):
    """Of a drafter in Python."""

    each_step = True

    def __init__(self, drafter: Drafter, drafts: DraftColumns, n_vocab: int) -> None:
        self._drafter: Drafter | None = drafter
        self._ended: Callable[[int], object] | None = getattr(drafter, "ended", None)
        self._drafts = drafts
        self._n_vocab = n_vocab

    def ended(self, id: int) -> None:
        if self._ended is not None and self._drafter is not None:
            try:
                self._ended(id)
            except Exception:
                self._give_up()

    def fill(self, step: Step, request_in: Callable[[int], Request]) -> None:
        if self._drafter is None or not step.drafts:
            return
        slots = [slot for slot in step.decode.tolist() if slot in step.drafts]
        wanted = [_wanted(request_in(slot), step.drafts[slot]) for slot in slots]
        try:
            drafted = self._checked(wanted, self._drafter.draft(wanted))
        except Exception:
            self._give_up()
            return
        for slot, tokens in zip(slots, drafted, strict=True):
            self._drafts.n_given[slot] = len(tokens)
            self._drafts.token[slot, : len(tokens)] = tokens

    def _checked(
        self, wanted: Sequence[Wanted], given: Sequence[Sequence[int]]
    ) -> list[Sequence[int]]:
        if len(given) != len(wanted):
            raise ArgumentError("drafts", f"{len(given)} of them", f"must be {len(wanted)}")
        for one, tokens in zip(wanted, given, strict=True):
            if len(tokens) > one.n:
                raise ArgumentError("drafts", f"{len(tokens)} tokens", f"at most n={one.n}")
            if any(not 0 <= token < self._n_vocab for token in tokens):
                limit = f"tokens in 0..{self._n_vocab - 1}"
                raise ArgumentError("drafts", [int(token) for token in tokens], limit)
        return list(given)

    def _give_up(self) -> None:
        log.exception("the drafter %r is not asked any more", self._drafter)
        self._drafter, self.each_step, self.is_over = None, False, True


def _wanted(request: Request, n: int) -> Wanted:
    tokens = request.known().view()
    tokens.flags.writeable = False
    return Wanted(request.id, tokens, request.n_given, n)


def load_draft(drafter: AnyDrafter | None, target: Model) -> LoadedDraft | None:
    """The model that drafts for this one, where a model does. Raises what loading one raises, and
    ArgumentError for one that does not suit."""
    if isinstance(drafter, Mtp):
        _check_mtp(target)
        layers = 1 / target.n_layer
        return LoadedDraft(target, False, layers, layers, drafter.n_ctx)
    if not isinstance(drafter, Draft):
        return None
    own = not isinstance(drafter.model, Model)
    model = drafter.model if isinstance(drafter.model, Model) else _load(drafter.model, target)
    found = LoadedDraft(model, own, 1.0, model.size_bytes / target.size_bytes, drafter.n_ctx)
    try:
        _check_vocabulary(drafter, model, target)
    except BaseException:
        found.close()
        raise
    return found


def feed_of(
    drafter: AnyDrafter | None, loaded: LoadedDraft | None, stepper: Any, n_cells: int, params: Any
) -> Feed:
    """For the drafter of an engine, and its model if it has one. n_cells: of all its sequences.
    params: of its context. Raises what making a context raises."""
    if loaded is not None:
        return ModelFeed(loaded, stepper, n_cells, params)
    if drafter is None or isinstance(drafter, Ngram | Draft | Mtp):
        return Feed()
    return PythonFeed(drafter, stepper.drafts, stepper.n_vocab)


def _check_vocabulary(drafter: Draft, model: Model, target: Model) -> None:
    try:
        check_same_vocabulary(model.vocab, target.vocab)
    except ArgumentError as error:
        if drafter.model:
            raise
        limit = f"drafts for the embedded model, this one takes draft:FILE ({error})"
        raise ArgumentError("speculate", "draft", limit) from None


def _check_mtp(model: Model) -> None:
    if not model.n_layer_nextn:
        limit = "this model has no layers that predict further tokens: take ngram or draft:FILE"
        raise ArgumentError("speculate", "mtp", limit)
    if not model._load.get("load_mtp"):
        limit = "the model was loaded without those layers: Model(path, load_mtp=True)"
        raise ArgumentError("speculate", "mtp", limit)


def _load(path: PathLike, target: Model) -> Model:
    load: dict[str, Any] = target._load
    path = path or default_draft_path()
    return Model(path, n_gpu_layers=load["n_gpu_layers"], devices=load.get("devices"))
