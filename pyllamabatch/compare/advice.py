"""What to use on this machine for this model: plain sentences that follow from the records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from pyllamabatch.compare.comparison import POISSON, Comparison, by_bench
from pyllamabatch.report.medians import median_of
from pyllamabatch.report.meters import BUSY
from pyllamabatch.report.records import Record

NOISE = 0.03  # ratios of speeds closer to 1 say nothing
MORE = 1.05  # memory, energy: what counts as a difference
LATER = 1.2  # TTFT and ITL: likewise
UNEVEN = 0.9  # fairness below it is worth a word
FEW_WEIGHTS = 100 * 2**20  # bytes: below, what libraries share hides what weights share
GIB = 2**30

ARMS = ("engine", "contexts", "processes", "shared")
MAIN = ("compare", "compare-ds4", POISSON)
"""The bench whose speeds decide: the first of these that has records."""
MEMORY = (
    ("device_bytes", "on the device"),
    ("pss_bytes", "PSS"),
    ("footprint_bytes", "footprint"),
    ("rss_bytes", "RSS"),
)
EACH = "per_sequence_tokens_per_second"


def advice(records: Iterable[Record]) -> str:
    """A line if the machine was busy, one for each number of users, and one for all; "" without
    records."""
    records = list(records)
    groups = by_bench(records)
    main = next((groups[bench] for bench in MAIN if bench in groups), None)
    if main is None:
        return ""
    each = [Advice(main, n, groups.get(POISSON)) for n in main.counts]
    warning = busy(records)
    lines = [warning, *(one.sentences() for one in each), _overall(main, each, bool(warning))]
    return "\n".join(filter(None, lines))


def busy(records: Sequence[Record]) -> str:
    """How much of the machine others used, if that was enough to disturb a run."""
    known = [record for record in records if "other_cpu" in record.detail]
    disturbed = [r for r in known if r.detail["other_cpu"] > BUSY * r.n_cores]
    if not disturbed:
        return ""
    most = max(record.detail["other_cpu"] for record in disturbed)
    return (
        f"The machine was busy: in {len(disturbed)} of {len(known)} runs other programs used "
        f"CPU, up to {most:.1f} of {disturbed[0].n_cores} cores. Speeds may be far off, and what "
        "follows with them: measure again when it is quiet."
    )


def as_fast(ratios: Sequence[float]) -> bool:
    """Whether ratios of repeats say nothing about which is faster: their median is closer to 1
    than `NOISE`, or than half of what they differ."""
    middle = median_of(ratios)
    if middle is None:
        return False
    return abs(middle - 1) <= max(NOISE, (max(ratios) - min(ratios)) / 2)


def memory_kind(them: Comparison) -> tuple[str, str]:
    """The first figure of `MEMORY` that an arm has, and its name; "" without one."""
    return next((m for m in MEMORY if any(m[0] in r.detail for r in them.good)), ("", ""))


@dataclass
class Advice:
    """`n` users: the arm to take, and the sentences about it."""

    them: Comparison
    n: int
    poisson: Comparison | None

    def __post_init__(self) -> None:
        them, n = self.them, self.n
        # where requests come at random, all arms together are as fast as these come
        self.at_random = them.bench == POISSON
        rank = (lambda arm: them.detail(arm, n, EACH)) if self.at_random else self._speed
        self.speeds = {arm: s for arm in them.arms if (s := rank(arm)) is not None}
        if n > 1:
            self.speeds.pop("single", None)
        self.arm, self.equal, self.why = self._choice() if self.speeds else ("", [], "")

    def sentences(self) -> str:
        failed = [
            f"{arm} has no result: {why}"
            for arm in self.them.arms
            if (why := self.them.problem(arm, self.n))
        ]
        users = "1 user" if self.n == 1 else f"{self.n} users"
        if not self.speeds:
            return _sentences(f"{users}: nothing to take", *failed)
        return _sentences(
            f"{users}: {self.arm}, {self._at_random() if self.at_random else self._together()}",
            self._ties(),
            "" if self.at_random else self._limits(),
            self._memory(),
            self._energy(),
            self._latency(),
            *failed,
        )

    def _speed(self, arm: str) -> float | None:
        return self.them.speed(arm, self.n)

    def _detail(self, name: str, arms: Iterable[str]) -> dict[str, float]:
        return {a: v for a in arms if (v := self.them.detail(a, self.n, name)) is not None}

    def _choice(self) -> tuple[str, list[str], str]:
        """One of the arms that are as fast as the fastest, these, and why it. The raw loop does
        what the engine does without requests that come and go: it is taken only when the engine
        is slower, or was not measured."""
        best = max(self.speeds, key=lambda arm: self.speeds[arm])
        ratios = {arm: self.them.ratios(arm, self.n, best) for arm in self.speeds}
        if self.at_random:
            ratios = {arm: [speed / self.speeds[best]] for arm, speed in self.speeds.items()}
        equal = [best, *(arm for arm in self.speeds if arm != best and as_fast(ratios[arm]))]
        kinds = {_kind(arm) for arm in equal}
        able = [arm for arm in equal if _kind(arm) != "shared" or "engine" not in kinds]
        able.sort(key=_rank)
        name, words = self._memory_kind(able)
        if len(able) > 1 and name:
            sizes = self._detail(name, able)
            least = min(able, key=lambda arm: sizes[arm])
            if all(sizes[arm] > MORE * sizes[least] for arm in able if arm != least):
                return least, equal, f"{least} takes the least memory ({words})"
        if "shared" in kinds and "engine" in kinds:
            return able[0], equal, "the engine also lets requests come and go"
        return able[0], equal, ""

    def _together(self) -> str:
        speed = self.speeds[self.arm]
        if self.n == 1:
            return f"{speed:.4g} tok/s"
        each = self.them.detail(self.arm, self.n, EACH) or speed / self.n
        bases = (("contexts", None, "contexts"), ("single", 1, "one user alone"))
        found = [
            f"{ratio:.2f} × {words}"
            for base, base_n, words in bases
            if base != self.arm and (ratio := self.them.ratio(self.arm, self.n, base, base_n))
        ]
        text = f"{speed:.4g} tok/s together and {each:.4g} each"
        return f"{text}: {_list(found)}" if found else text

    def _at_random(self) -> str:
        speed = self.speeds[self.arm]
        return f"{speed:.4g} tok/s for a request that comes at random, waiting included"

    def _ties(self) -> str:
        others = [arm for arm in self.equal if arm != self.arm]
        if not others:
            return ""
        text = f"{_list(others)} {'is' if len(others) == 1 else 'are'} as fast within the noise"
        return f"{text}; {self.why}" if self.why else text

    def _limits(self) -> str:
        found = []
        if self.n > 1 and (over := self.them.ratios(self.arm, self.n, "single", 1)):
            if as_fast(over):
                found.append(f"{self.n} users share what one alone gets")
            elif (median_of(over) or 1.0) < 1:
                found.append(
                    f"together they get less than one alone, so {self.n} one after the other"
                )
        engine = self.them.ratio("engine", self.n, self.arm)
        if _kind(self.arm) == "shared" and engine is not None:
            found.append(
                f"it is a plain loop, for those who start together: the engine has {engine:.2f} "
                "of that"
            )
        fairness = self.them.detail(self.arm, self.n, "fairness")
        if fairness is not None and fairness < UNEVEN:
            found.append(f"its streams are uneven (fairness {fairness:.2f})")
        text = "; ".join(found)
        return text[:1].upper() + text[1:]

    def _memory_kind(self, arms: Sequence[str]) -> tuple[str, str]:
        """The first figure of `MEMORY` that all of them have; "" without one."""
        known = (m for m in MEMORY if len(self._detail(m[0], arms)) == len(arms))
        return next(known, ("", ""))

    def _memory(self) -> str:
        name, words = self._memory_kind(list(self.speeds))
        if self.n == 1 or not name:
            return ""
        sizes = {arm: size / GIB for arm, size in self._detail(name, self.speeds).items()}
        return self._takes(sizes, ".2f", f"GiB ({words})")

    def _energy(self) -> str:
        joules = {arm: self.them.joules_per_token(arm, self.n) for arm in self.speeds}
        return self._takes({a: j for a, j in joules.items() if j is not None}, ".3g", "J a token")

    def _takes(self, values: dict[str, float], form: str, unit: str) -> str:
        """What the arm and the others take; nothing where that is as much."""
        if self.arm not in values or max(values.values()) <= MORE * min(values.values()):
            return ""
        others = sorted((arm for arm in values if arm != self.arm), key=_rank)
        told = ", ".join(f"{arm} {values[arm]:{form}}" for arm in others)
        return f"{self.arm} takes {values[self.arm]:{form}} {unit}, {told}"

    def _latency(self) -> str:
        """Which other arm answers sooner when requests come at random."""
        if self.poisson is None:
            return ""
        found = []
        for name, words in (("ttft_p99_s", "first token"), ("itl_p99_s", "next token")):
            arms = [arm for arm in self.poisson.arms if arm != "single"]
            times = {a: t for a in arms if (t := self.poisson.detail(a, self.n, name))}
            if self.arm not in times:
                continue
            first = min(times, key=lambda arm: times[arm])
            if times[self.arm] > LATER * times[first]:
                p99 = f"p99 {_time(times[first])} to {_time(times[self.arm])}"
                found.append(f"{first} has the {words} sooner ({p99})")
        return f"When requests come at random, {_list(found)}" if found else ""


def _overall(them: Comparison, each: Sequence[Advice], busy: bool) -> str:
    record = them.records[0]
    where = record.gpu_info or f"{record.n_cores} cores of {record.cpu_info.split(' (')[0]}"
    model = record.model_filename.removesuffix(".gguf")
    several = [one for one in each if one.n > 1 and one.arm]
    parts = [
        f"{arm} for {_list([str(one.n) for one in group])} users"
        for arm, group in groupby(several, key=lambda one: one.arm)
    ]
    where += ", as far as a busy machine tells" if busy else ""
    known = {_kind(arm) for arm in them.arms}
    missing = [arm for arm in ARMS if arm not in known]
    return _sentences(
        f"Overall, with {model} on {where}: {', then '.join(parts) or 'no arm to take'}",
        _sharing(them),
        f"Not measured: {_list(missing)}" if missing else "",
        "" if any(r.repeat for r in them.records) else "Each ran once: noise is not known",
    )


def _sharing(them: Comparison) -> str:
    """What most of the processes have in common, as far as RSS and PSS say it."""
    arm = next((arm for arm in them.arms if _kind(arm) == "processes"), "")
    found = {
        n: (rss, pss)
        for n in them.counts
        if (rss := them.detail(arm, n, "rss_bytes")) and (pss := them.detail(arm, n, "pss_bytes"))
    }
    n, least = max(found, default=0), min(found, default=0)
    weights = them.records[0].model_size
    if n < 2 or weights < FEW_WEIGHTS:
        return ""
    rss, pss = found[n]
    text = f"{pss / GIB:.2f} GiB together (PSS), their RSS adds up to {rss / GIB:.2f}"
    if least < n:
        more = (pss - found[least][1]) / (n - least) / GIB
        text += f"; each further one adds {more:.2f} of its own"
    if rss - pss >= (n - 1) * weights / 2:
        return f"The {n} processes share the file that they map: {text}"
    return f"The {n} processes share little of the weights, which are copied, not mapped: {text}"


def _kind(arm: str) -> str:
    """Without its sampler."""
    return arm.split()[0]


def _rank(arm: str) -> int:
    words = ("single", *ARMS)
    return words.index(_kind(arm)) if _kind(arm) in words else len(words)


def _sentences(*parts: str) -> str:
    return " ".join(f"{part}." for part in parts if part)


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 10 else f"{seconds:.3g} s"


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
