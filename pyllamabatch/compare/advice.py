"""What to use on this machine for this model: plain sentences that follow from the medians."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

from pyllamabatch.compare.comparison import EACH, JOULES, SPEED, Comparison, by_bench
from pyllamabatch.planner.machines import GIB
from pyllamabatch.report.disturbed import undisturbed, unwatched, warning
from pyllamabatch.report.records import Record

NOISE = 0.03  # ratios of speeds closer to 1 say nothing
MORE = 1.05  # memory, energy: what counts as a difference
UNEVEN = 0.9  # fairness below it is worth a word
ARMS = ("single", "engine", "contexts", "processes", "shared", "replicas")
"""Of arms that are alike in everything the first one is taken."""


@dataclass(frozen=True)
class Choice:
    """The arm to take, those that are as fast as the fastest, and why it of these."""

    arm: str
    equal: Sequence[str]
    why: str = ""


def advice(records: Iterable[Record]) -> str:
    """A line if the machine was busy, one if no one has looked, one for each number of users, and
    one for all; "" without records. Of several benches the first one's speeds decide.

    Runs that others disturbed count for nothing: where an arm has no other result, there is no
    advice for so many users, and none for all."""
    records = list(records)
    benches = by_bench(records)
    if not benches:
        return ""
    asked = next(iter(benches.values()))
    quiet = undisturbed(asked.records)
    them = Comparison(quiet) if quiet else asked
    lines = [f"{told} These count for nothing below." if (told := warning(records)) else ""]
    lines.append(unwatched(records))
    lost = {n: arms for n in asked.counts if (arms := lost_arms(asked, quiet, n))}
    choices = {n: choice(them, n) for n in asked.counts if n not in lost}
    for n in asked.counts:
        if n in lost:
            users = "1 user" if n == 1 else f"{n} users"
            lines.append(f"{users}: no advice, every run of {_list(lost[n])} was disturbed.")
        else:
            lines.append(for_users(them, n, choices[n]))
    last = "Overall: no advice. Measure again when the machine is quiet."
    return "\n".join(filter(None, [*lines, last if lost else overall(them, choices)]))


def lost_arms(asked: Comparison, quiet: Sequence[Record], n: int) -> list[str]:
    """Arms that have a result at n users, but none that others did not disturb."""
    had = {record.arm for record in asked.good if record.pl == n}
    have = {record.arm for record in quiet if record.pl == n}
    return [arm for arm in asked.arms if arm in had - have]


def as_fast(ratios: Sequence[float]) -> bool:
    """Whether ratios of repeats say nothing about which is faster: their median is closer to 1
    than `NOISE`, or than half of what they differ."""
    if not ratios:
        return False
    return abs(median(ratios) - 1) <= max(NOISE, (max(ratios) - min(ratios)) / 2)


def speeds_of(them: Comparison, n: int) -> dict[str, float]:
    """Of the arms that can be taken. Where requests come at random, all arms together are as fast
    as these come: the speed of a request decides."""
    arms = [arm for arm in them.arms if n == 1 or arm != "single"]
    return them.all(n, EACH if them.at_random else SPEED, arms)


def choice(them: Comparison, n: int) -> Choice:
    """The raw loop does what the engine does without requests that come and go: it is taken only
    when the engine is slower, or was not measured. `arm` is "" without a result."""
    speeds = speeds_of(them, n)
    if not speeds:
        return Choice("", [])
    best = max(speeds, key=lambda arm: speeds[arm])
    ratios = {
        arm: [speed / speeds[best]] if them.at_random else them.ratios(arm, n, best)
        for arm, speed in speeds.items()
    }
    equal = [best, *(arm for arm in speeds if arm != best and as_fast(ratios[arm]))]
    able = [arm for arm in equal if arm != "shared" or "engine" not in equal]
    able.sort(key=ARMS.index)
    name, words = them.memory(n, able)
    if len(able) > 1 and name:
        sizes = them.all(n, name, able)
        least = min(able, key=lambda arm: sizes[arm])
        if all(sizes[arm] > MORE * sizes[least] for arm in able if arm != least):
            return Choice(least, equal, f"{least} takes the least memory ({words})")
    both = "shared" in equal and "engine" in equal
    return Choice(able[0], equal, "the engine also lets requests come and go" if both else "")


def for_users(them: Comparison, n: int, chosen: Choice) -> str:
    failed = [f"{arm} has no result: {why}" for arm in them.arms if (why := them.problem(arm, n))]
    users = "1 user" if n == 1 else f"{n} users"
    if not chosen.arm:
        return _sentences(f"{users}: nothing to take", *failed)
    speeds = speeds_of(them, n)
    if them.at_random:
        speed = (
            f"{speeds[chosen.arm]:.4g} tok/s for a request that comes at random, waiting included"
        )
    else:
        speed = together(them, n, chosen.arm)
    joules = them.all(n, JOULES, speeds)
    memory, words = them.memory(n, speeds)
    sizes = {arm: size / GIB for arm, size in them.all(n, memory, speeds).items()} if n > 1 else {}
    return _sentences(
        f"{users}: {chosen.arm}, {speed}",
        ties(chosen),
        "" if them.at_random else limits(them, n, chosen.arm),
        takes(chosen.arm, sizes, ".2f", f"GiB ({words})"),
        takes(chosen.arm, joules, ".3g", "J a token"),
        *failed,
    )


def together(them: Comparison, n: int, arm: str) -> str:
    speed = them.get(arm, n, SPEED) or 0.0
    if n == 1:
        return f"{speed:.4g} tok/s"
    bases = (("contexts", None, "contexts"), ("single", 1, "one user alone"))
    found = [
        f"{ratio:.2f} × {words}"
        for base, base_n, words in bases
        if base != arm and (ratio := them.ratio(arm, n, base, base_n))
    ]
    text = f"{speed:.4g} tok/s together and {them.get(arm, n, EACH) or speed / n:.4g} each"
    return f"{text}: {_list(found)}" if found else text


def ties(chosen: Choice) -> str:
    others = [arm for arm in chosen.equal if arm != chosen.arm]
    if not others:
        return ""
    text = f"{_list(others)} {'is' if len(others) == 1 else 'are'} as fast within the noise"
    return f"{text}; {chosen.why}" if chosen.why else text


def limits(them: Comparison, n: int, arm: str) -> str:
    found = []
    over = them.ratios(arm, n, "single", 1) if n > 1 else []
    if as_fast(over):
        found.append(f"{n} users share what one alone gets")
    elif over and median(over) < 1:
        found.append(f"together they get less than one alone, so {n} one after the other")
    engine = them.ratio("engine", n, arm)
    if arm == "shared" and engine is not None:
        found.append(
            f"it is a plain loop, for those who start together: the engine has {engine:.2f} of that"
        )
    fairness = them.get(arm, n, "fairness")
    if fairness is not None and fairness < UNEVEN:
        found.append(f"its streams are uneven (fairness {fairness:.2f})")
    text = "; ".join(found)
    return text[:1].upper() + text[1:]


def takes(arm: str, values: Mapping[str, float], form: str, unit: str) -> str:
    """What the arm and the others take; nothing where that is as much."""
    if arm not in values or max(values.values()) <= MORE * min(values.values()):
        return ""
    others = sorted(values.keys() - {arm}, key=ARMS.index)
    told = ", ".join(f"{other} {values[other]:{form}}" for other in others)
    return f"{arm} takes {values[arm]:{form}} {unit}, {told}"


def overall(them: Comparison, choices: Mapping[int, Choice]) -> str:
    record = them.records[0]
    where = record.gpu_info or f"{record.n_cores} cores of {record.cpu_info.split(' (')[0]}"
    model = record.model_filename.removesuffix(".gguf")
    several = [(n, chosen.arm) for n, chosen in choices.items() if n > 1 and chosen.arm]
    parts = [
        f"{arm} for {_list([str(n) for n, _ in group])} users"
        for arm, group in groupby(several, key=lambda one: one[1])
    ]
    missing = [arm for arm in ARMS if arm not in ("single", "replicas", *them.arms)]
    return _sentences(
        f"Overall, with {model} on {where}: {', then '.join(parts) or 'no arm to take'}",
        f"Not measured: {_list(missing)}" if missing else "",
        "" if any(r.repeat for r in them.records) else "Each ran once: noise is not known",
    )


def _sentences(*parts: str) -> str:
    return " ".join(f"{part}." for part in parts if part)


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
