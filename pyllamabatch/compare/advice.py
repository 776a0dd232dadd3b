"""What to use on this machine for this model: a few plain sentences that follow from the rows.

An arm is as fast as another when the median of their ratios is closer to 1 than `NOISE`, or closer
than half of what the ratios of single repeats differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from pyllamabatch.compare.comparison import Comparison, by_bench
from pyllamabatch.report.medians import median_of
from pyllamabatch.report.records import Record

NOISE = 0.03
MORE = 1.05  # memory, energy: what counts as a difference
LATER = 1.2  # TTFT and ITL: likewise
UNEVEN = 0.9  # fairness below it is worth a word
FEW_WEIGHTS = 100 * 2**20  # bytes: below, what libraries share hides what weights share
GIB = 2**30

ARMS = ("engine", "contexts", "processes", "shared")
MAIN = ("compare", "compare-ds4", "compare-poisson")
"""The bench whose speeds decide: the first of these that has rows."""
MEMORY = (
    ("device_bytes", "on the device"),
    ("pss_bytes", "PSS"),
    ("footprint_bytes", "footprint"),
    ("rss_bytes", "RSS"),
)


def advice(rows: Iterable[Record]) -> str:
    """A line for each number of users, and one for all; "" without rows."""
    groups = by_bench(rows)
    main = next((groups[bench] for bench in MAIN if bench in groups), None)
    if main is None:
        return ""
    chosen: list[tuple[int, str]] = []
    lines = []
    for n in main.counts:
        arm, text = _for(n, main, groups.get("compare-poisson"))
        lines.append(text)
        if arm:
            chosen.append((n, arm))
    return "\n".join([*lines, _overall(main, chosen)])


def as_fast(ratios: Sequence[float]) -> bool:
    """Whether ratios of repeats say nothing about who is faster."""
    middle = median_of(ratios)
    if middle is None:
        return False
    return abs(middle - 1) <= max(NOISE, (max(ratios) - min(ratios)) / 2)


def _for(n: int, them: Comparison, poisson: Comparison | None) -> tuple[str, str]:
    """The arm for n users ("" if none has a result), and the sentences about it."""
    users = "1 user" if n == 1 else f"{n} users"
    at_random = them.bench == MAIN[-1]
    rank = _each if at_random else Comparison.speed
    speeds = {arm: s for arm in them.arms if (s := rank(them, arm, n)) is not None}
    if n > 1:
        speeds.pop("single", None)
    failed = [f"{arm} has no result: {p}" for arm in them.arms if (p := them.problem(arm, n))]
    if not speeds:
        return "", _sentences(f"{users}: nothing to take", *failed)
    best = max(speeds, key=lambda arm: speeds[arm])
    ratios = {
        arm: [speeds[arm] / speeds[best]] if at_random else them.ratios(arm, n, best)
        for arm in speeds
        if arm != best
    }
    equal = [best, *(arm for arm in ratios if as_fast(ratios[arm]))]
    arm, why = _pick(equal, them, n)
    return arm, _sentences(
        f"{users}: {arm}, {_request(arm, n, them) if at_random else _speed(arm, n, them)}",
        _ties(arm, equal, why),
        "" if at_random else _limits(arm, n, them),
        _memory(arm, n, them, list(speeds)),
        _energy(arm, n, them, list(speeds)),
        _latency(arm, n, poisson),
        *failed,
    )


def _sentences(*parts: str) -> str:
    return " ".join(f"{part}." for part in parts if part)


def _rank(arm: str) -> int:
    words = ("single", *ARMS)
    return words.index(arm.split()[0]) if arm.split()[0] in words else len(words)


def _pick(equal: list[str], them: Comparison, n: int) -> tuple[str, str]:
    """One of the arms that are as fast, and why. The raw loop is what the engine does without
    requests that come and go: it is taken only when the engine is slower, or was not measured."""
    kinds = {arm.split()[0] for arm in equal}
    able = [arm for arm in equal if arm.split()[0] != "shared" or "engine" not in kinds]
    able.sort(key=_rank)
    name, kind = _memory_kind(them, n, able)
    if len(able) > 1 and name:
        sizes = {arm: them.detail(arm, n, name) or 0.0 for arm in able}
        least = min(able, key=lambda arm: sizes[arm])
        if all(sizes[arm] > MORE * sizes[least] for arm in able if arm != least):
            return least, f"{least} takes the least memory ({kind})"
    if "shared" in kinds and "engine" in kinds:
        return able[0], "the engine also lets requests come and go"
    return able[0], ""


def _speed(arm: str, n: int, them: Comparison) -> str:
    speed = them.speed(arm, n) or 0.0
    if n == 1:
        return f"{speed:.4g} tok/s"
    each = _each(them, arm, n) or speed / n
    text = f"{speed:.4g} tok/s together and {each:.4g} each"
    found = [
        f"{ratio:.2f} × {words}"
        for base, base_n, words in (("contexts", None, "contexts"), ("single", 1, "one user alone"))
        if base != arm and (ratio := them.ratio(arm, n, base, base_n)) is not None
    ]
    return f"{text}: {_list(found)}" if found else text


def _each(them: Comparison, arm: str, n: int) -> float | None:
    return them.detail(arm, n, "per_sequence_tokens_per_second")


def _request(arm: str, n: int, them: Comparison) -> str:
    """When requests come at random, how fast all are is how fast they come: each one's own speed
    counts, from when it came."""
    each = _each(them, arm, n) or 0.0
    return f"{each:.4g} tok/s for a request that comes at random, waiting included"


def _ties(arm: str, equal: list[str], why: str) -> str:
    others = [other for other in equal if other != arm]
    if not others:
        return ""
    text = f"{_list(others)} {'is' if len(others) == 1 else 'are'} as fast within the noise"
    return f"{text}; {why}" if why else text


def _limits(arm: str, n: int, them: Comparison) -> str:
    found = []
    if n > 1 and (over := them.ratios(arm, n, "single", 1)):
        if as_fast(over):
            found.append(f"{n} users share what one alone gets")
        elif (median_of(over) or 1.0) < 1:
            found.append(f"together they get less than one alone, so {n} one after the other")
    if arm.split()[0] == "shared" and (engine := them.ratio("engine", n, arm)) is not None:
        found.append(
            f"it is a plain loop, for those who start together: the engine has {engine:.2f} of that"
        )
    fairness = them.detail(arm, n, "fairness")
    if fairness is not None and fairness < UNEVEN:
        found.append(f"its streams are uneven (fairness {fairness:.2f})")
    text = "; ".join(found)
    return text[:1].upper() + text[1:]


def memory_kind(them: Comparison) -> tuple[str, str]:
    """The first figure of `MEMORY` that anybody has, and its name; "" when there is none."""
    return next((m for m in MEMORY if any(m[0] in row.detail for row in them.good)), ("", ""))


def _memory_kind(them: Comparison, n: int, arms: Sequence[str]) -> tuple[str, str]:
    """The figure that all of them have; "" when there is none."""
    for name, words in MEMORY:
        if all(them.detail(arm, n, name) is not None for arm in arms):
            return name, words
    return "", ""


def _memory(arm: str, n: int, them: Comparison, arms: list[str]) -> str:
    name, words = _memory_kind(them, n, arms)
    if n == 1 or not name or len(arms) < 2:
        return ""
    sizes = {other: them.detail(other, n, name) or 0.0 for other in arms}
    if max(sizes.values()) <= MORE * min(sizes.values()):
        return ""
    others = sorted((other for other in arms if other != arm), key=_rank)
    told = ", ".join(f"{other} {sizes[other] / GIB:.2f}" for other in others)
    return f"{arm} takes {sizes[arm] / GIB:.2f} GiB ({words}), {told}"


def _energy(arm: str, n: int, them: Comparison, arms: list[str]) -> str:
    joules = {a: j for a in arms if (j := them.joules_per_token(a, n)) is not None}
    if arm not in joules:
        return ""
    text = f"{arm} takes {joules[arm]:.3g} J a token"
    least = min(joules, key=lambda a: joules[a])
    if joules[arm] > MORE * joules[least]:
        return f"{text}, {least} less ({joules[least]:.3g})"
    return text + (", the least of all" if len(joules) > 1 else "")


def _latency(arm: str, n: int, poisson: Comparison | None) -> str:
    """Who answers sooner when requests come at random, if it is somebody else."""
    if poisson is None:
        return ""
    found = []
    for name, words in (("ttft_p99_s", "first token"), ("itl_p99_s", "next token")):
        times = {a: t for a in poisson.arms if (t := poisson.detail(a, n, name)) and a != "single"}
        if arm not in times:
            continue
        first = min(times, key=lambda a: times[a])
        if times[arm] > LATER * times[first]:
            found.append(
                f"{first} has the {words} sooner (p99 {_ms(times[first])} to {_ms(times[arm])})"
            )
    return f"When requests come at random, {_list(found)}" if found else ""


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 10 else f"{seconds:.3g} s"


def _overall(them: Comparison, chosen: list[tuple[int, str]]) -> str:
    row = them.records[0]
    where = row.gpu_info or f"{row.n_cores} cores of {row.cpu_info.split(' (')[0]}"
    model = row.model_filename.removesuffix(".gguf")
    several = [(n, arm) for n, arm in chosen if n > 1]
    parts = [
        f"{arm} for {_list([str(n) for n, _ in runs])} users"
        for arm, runs in ((a, list(g)) for a, g in groupby(several, key=lambda item: item[1]))
    ]
    text = f"Overall, with {model} on {where}: {', then '.join(parts) or 'no arm to take'}"
    known = {arm.split()[0] for arm in them.arms}
    missing = [arm for arm in ARMS if arm not in known]
    return _sentences(
        text,
        _sharing(them),
        f"Not measured: {_list(missing)}" if missing else "",
        "" if any(row.repeat for row in them.records) else "Each ran once: noise is not known",
    )


def _sharing(them: Comparison) -> str:
    """What processes have in common, as far as RSS and PSS say it, for the most of them."""
    arm = next((arm for arm in them.arms if arm.split()[0] == "processes"), "")
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


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
