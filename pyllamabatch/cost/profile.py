"""Profile: what was measured on one device with one model, as JSON, and where profiles are stored.

`pyllamabatch calibrate` saves profiles in the user's cache folder (`profile_folder`). The package
ships others in `cost/profiles`. `find_profile` takes the best match of both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from math import isfinite, log2
from pathlib import Path
from typing import Any

from pyllamabatch.cost.kernels import Kernels, Regime, is_cuda
from pyllamabatch.errors import ArgumentError, ProfileError
from pyllamabatch.llama.host import whole_file
from pyllamabatch.models.cache import cache_folder

SCHEMA = 1
SHIPPED = Path(__file__).parent / "profiles"
_THREADS_APART = 2  # doublings: an engine corrects a fit by a factor of four
_BUILD = ("llama_cpp", "driver")
_SHARES_APART = 0.1  # of the weights, on the device


@dataclass(frozen=True, slots=True)
class Shape:
    """A step. rows: in all. prefill: prompt rows among them, in `n_chunks` sequences; the others
    decode, a sequence each. depth: cells that every sequence holds before it."""

    rows: int
    prefill: int = 0
    n_chunks: int = 0
    depth: int = 0

    @property
    def n_seqs(self) -> int:
        return self.rows - self.prefill + self.n_chunks

    @property
    def kv(self) -> int:
        """Cells that are held before the step."""
        return self.n_seqs * self.depth

    def chunks(self) -> list[int]:
        """Prompt rows of each sequence that has some."""
        if not self.n_chunks:
            return []
        each, more = divmod(self.prefill, self.n_chunks)
        return [each + (i < more) for i in range(self.n_chunks)]


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured step, whose graph is reused.

    rows: in all; prefill: prompt rows among them; kv: cells held before it; n_seqs: sequences with
    rows in it; unified: one pool of cells, not a stream for each. seconds: the median; spread: half
    of the range between the quartiles, relative to it (0: only the median is known); n: measured
    steps (0: all were disturbed). new, settle: see `NewGraph` (None: not known)."""

    rows: int
    prefill: int
    kv: float
    n_seqs: int
    unified: bool
    seconds: float
    spread: float = 0.0
    n: int = 1
    new: float | None = None
    settle: float | None = None

    @property
    def shape(self) -> tuple[int, int, float, int]:
        """As `CostModel.predict` takes it."""
        return self.rows, self.prefill, self.kv, self.n_seqs

    def new_graphs(self, n_ubatch: int) -> int:
        """Graphs that are new in every one of equal steps. libllama keeps the last graph only, so
        of a step in several ubatches none is reused."""
        apart = self.prefill and not self.unified  # see `Step.parts`
        sizes = (self.rows - self.prefill, self.prefill) if apart else (self.rows,)
        n = sum(-(-size // n_ubatch) for size in sizes)
        return n if n > 1 else 0


KINDS: Mapping[str, Callable[[Sample], bool]] = {
    "steps that decode": lambda sample: not sample.prefill,
    "steps with prompt rows": lambda sample: sample.prefill > 0,
}


@dataclass(frozen=True, slots=True)
class Key:
    """What a step's time depends on beside its shape. A profile suits an engine with an equal key.

    device: its description. backend: ggml's name. model: `fingerprint`. context: parameters that
    change the kernels or the work (threads, cache types, flash attention, n_ubatch)."""

    device: str
    backend: str
    model: str
    context: Mapping[str, int | str] = field(default_factory=dict)

    def distance(self, other: Key) -> float | None:
        """0 for the same; more where context parameters differ, and the more, the more threads one
        has; None: of no use."""
        if (self.device, self.backend, self.model) != (other.device, other.backend, other.model):
            return None
        mine, theirs = self.context, other.context
        more = abs(log2(int(mine.get("n_threads", 1)) / int(theirs.get("n_threads", 1))))
        apart = abs(float(mine.get("on_device", 1)) - float(theirs.get("on_device", 1)))
        if more > _THREADS_APART or apart > _SHARES_APART:
            return None
        return more + sum(mine.get(name) != theirs.get(name) for name in {*mine, *theirs})


@dataclass(frozen=True, slots=True)
class Profile:
    """Raw samples and their origin. output_share: the output matrix's part of the weights that a
    row passes. n_expert, n_expert_used: of a mixture of experts, else 0. n_swa: cells of a sliding
    window that some layers have, else 0. cell_bytes: of a KV cell; 0: not known. about: driver,
    build, model, date, source; for people."""

    key: Key
    kernels: Kernels
    samples: tuple[Sample, ...]
    n_ubatch: int
    output_share: float = 0.0
    n_expert: int = 0
    n_expert_used: int = 0
    n_swa: int = 0
    cell_bytes: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)

    def has(self, *, unified: bool) -> bool:
        """There are samples of contexts with this cache layout."""
        return any(sample.unified == unified for sample in self.samples)

    def only(self, *, unified: bool) -> Profile:
        """The samples of one cache layout; all samples where it has none. One sequence alone is the
        same in both layouts, so its undisturbed samples of the other one fill gaps."""
        chosen = [s for s in self.samples if s.unified == unified]
        if not chosen:
            return self
        known = {s.shape for s in chosen if s.n > 0}
        alone = (s for s in self.samples if s.unified != unified and s.n_seqs == 1 and s.n > 0)
        chosen += [s for s in alone if s.shape not in known]
        return replace(self, samples=tuple(chosen))

    def lacks(self, *, unified: bool) -> list[str]:
        """The kinds of steps without a sample, for contexts of this layout: a model that is fitted
        to such a profile knows nothing of them."""
        samples = self.only(unified=unified).samples
        return [kind for kind, of_kind in KINDS.items() if not any(map(of_kind, samples))]

    def beside(self, earlier: Profile) -> Profile:
        """With the earlier profile's steps of a layout that this one has none of, where they are of
        the same device, context and build."""
        mine, theirs = ((p.key, p.kernels, *map(p.about.get, _BUILD)) for p in (self, earlier))
        measured = {sample.unified for sample in self.samples}
        others = (s for s in earlier.samples if mine == theirs and s.unified not in measured)
        return replace(self, samples=(*self.samples, *others))

    def to_json(self) -> str:
        """One JSON object, a sample a line."""
        data = {"schema": SCHEMA, **asdict(self)}
        rows = [json.dumps(list(sample.values())) for sample in data.pop("samples")]
        data["fields"] = [column.name for column in fields(Sample)]
        text = json.dumps(data, indent=1)[:-2]
        return text + ',\n "samples": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"

    @classmethod
    def from_json(cls, text: str, name: str = "profile") -> Profile:
        """Raises `ProfileError` for what is not a profile of this schema."""
        try:
            data = json.loads(text, parse_constant=_finite, parse_float=_finite)
            schema, columns, rows = (data.pop(part) for part in ("schema", "fields", "samples"))
            if schema != SCHEMA:
                raise ProfileError(name, f"schema {schema}, this version reads {SCHEMA}")
            samples = tuple(Sample(**dict(zip(columns, row, strict=True))) for row in rows)
            key = Key(**data.pop("key"))
            # An older file has neither tiles nor computes_masked.
            known = {"tiles": (), "computes_masked": is_cuda(key.backend), **data.pop("kernels")}
            known["regimes"] = tuple(Regime(**regime) for regime in known["regimes"])
            known["tiles"] = tuple(known["tiles"])
            profile = cls(key, Kernels(**known), samples, **data)
            _check(profile)
            return profile
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProfileError(name, f"{type(error).__name__}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as part:
            part.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(os.fspath(path), str(error)) from None
        return cls.from_json(text, os.fspath(path))


def _check(profile: Profile) -> None:
    """Raise ValueError or TypeError for numbers that no fit can take."""
    known = profile.kernels
    first = [regime.first for regime in known.regimes]
    tiles = [*known.tiles, *(regime.tile for regime in known.regimes)]
    if not (first[:1] == [1] and first == sorted({*first}) and min(tiles) >= 1):
        raise ValueError(f"no such kernels: {known}")
    n_threads = int(profile.key.context.get("n_threads", 1))
    least = min(profile.n_ubatch, known.attention_from, n_threads)
    if least < 1 or profile.key.distance(profile.key):
        raise ValueError(f"no such n_ubatch, attention_from or context: {profile.key}")
    if not 0 <= profile.output_share <= 1 or min(profile.n_swa, profile.cell_bytes) < 0:
        sizes = profile.output_share, profile.n_swa, profile.cell_bytes
        raise ValueError(f"output_share, n_swa or cell_bytes: {sizes}")
    if not 0 <= profile.n_expert_used <= profile.n_expert:
        raise ValueError(f"{profile.n_expert_used} experts of {profile.n_expert}")
    for s in profile.samples:
        if not (s.seconds > 0 and 0 <= s.prefill <= s.rows > 0 < s.n_seqs):
            raise ValueError(f"no such step: {s}")
        if min(s.kv, s.spread, s.n) < 0:
            raise ValueError(f"no such step: {s}")


def _finite(text: str) -> float:
    if not isfinite(number := float(text)):
        raise ValueError(f"{text} is no number")
    return number


def profile_folder() -> Path:
    """Where `pyllamabatch calibrate` keeps profiles: `profiles` in the user's cache folder."""
    return cache_folder("profiles")


def file_name(key: Key) -> str:
    """A profile's own name: one per device, model and context parameters."""
    words = [key.device, key.model, *(f"{k}-{v}" for k, v in sorted(key.context.items()))]
    name = "_".join(words).lower()
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:180] + ".json"


def find_profile(key: Key) -> Profile | None:
    """The profile at the least `Key.distance`; saved ones before shipped ones. None where there is
    none. Unreadable files are passed over."""
    best: tuple[float, Profile] | None = None
    for profile in _stored(key.model):
        distance = profile.key.distance(key)
        if distance is not None and (best is None or distance < best[0]):
            best = distance, profile
    return None if best is None else best[1]


def _stored(model: str) -> Iterator[Profile]:
    """Profiles of this model; the text of the others is not parsed."""
    for folder in (profile_folder(), SHIPPED):
        for path in sorted(folder.glob("*.json")):
            with suppress(ProfileError, OSError, UnicodeDecodeError):
                text = path.read_text(encoding="utf-8")
                if f'"{model}"' in text:
                    yield Profile.from_json(text, path.name)


def load_profile(name: str | None = None, *, argument: str = "profile") -> Profile:
    """A profile by name: shipped, saved by `pyllamabatch calibrate` (the file's name without
    .json), or a file. Without a name the one that was saved last. ArgumentError, which calls the
    name `argument`, for what is none; ProfileError for a file that is damaged, and for no file."""
    folder = profile_folder()
    if name is None:
        saved = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        if not saved:
            known = ", ".join(shipped_names())
            raise ProfileError(
                str(folder),
                f"no saved profile: run `pyllamabatch calibrate`, or name one of {known}",
            )
        return Profile.load(saved[-1])
    for path in (SHIPPED / f"{name}.json", folder / f"{name}.json", Path(name)):
        if path.is_file():
            return Profile.load(path)
    known = ", ".join(names := known_names())
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ArgumentError(argument, name, f"{hint}must be a file or one of {known}")


def known_names() -> list[str]:
    """Of the profiles that are shipped, and of those that are saved."""
    return [*shipped_names(), *sorted(path.stem for path in profile_folder().glob("*.json"))]


def shipped_profile(name: str) -> Profile:
    """A profile that comes with the package, by the name of its file without .json; ProfileError
    where there is none."""
    return Profile.load(SHIPPED / f"{name}.json")


def shipped_names() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.json"))
