"""Short tasks with one right answer each: what the default model was trained on.

A prompt is one user message in plain English, the answer is what the assistant must say, to the
byte. Sixteen different prompts in one batch therefore have sixteen known answers, and a crossed
wire between two sequences shows at once.

    >>> import random
    >>> make_task("add", random.Random(1)).kind
    'add'

Every task draws a *problem* (two operands, a text, a key and its value) and words it in one of a
few ways. A hash of the problem, not of the wording, decides whether it belongs to the training or
the held-out split, so that no wording of a held-out problem was ever trained on. Only the standard
library is used, and a task depends on nothing but its arguments.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from . import world

Split = Literal["train", "held_out"]

HELD_OUT_IN = 16
"""One problem in this many is held out."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_PLAIN = _LETTERS + _LETTERS.upper() + _DIGITS
_PUNCTUATION = ".,:;!?-+*/=()_'\"#@&%"
# Code points of two, three and four UTF-8 bytes: Latin, Greek, Cyrillic, kana, Han, emoji.
_FOREIGN = (
    (0xC0, 0xFF),
    (0x3B1, 0x3C9),
    (0x430, 0x44F),
    (0x3042, 0x3093),
    (0x4E00, 0x4E7F),
    (0x1F600, 0x1F64F),
)


@dataclass(frozen=True)
class Task:
    """One prompt and its only right answer."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class _Problem:
    """A drawn problem: ``key`` identifies it whatever its wording, and decides its split."""

    key: str
    prompt: str
    answer: str


def split_of(kind: str, key: str) -> Split:
    """The split that the problem ``key`` of task ``kind`` belongs to, for ever."""
    digest = hashlib.blake2b(f"{kind}:{key}".encode(), digest_size=4).digest()
    return "held_out" if int.from_bytes(digest, "big") % HELD_OUT_IN == 0 else "train"


def make_task(kind: str, rng: random.Random, split: Split = "held_out") -> Task:
    """Draw one task of ``kind`` (a name in ``TASKS``) from ``split``."""
    draw = TASKS[kind]
    while True:
        problem = draw(rng)
        if split_of(kind, problem.key) == split:
            return Task(kind, problem.prompt, problem.answer)


def make_tasks(kind: str, n: int, seed: int = 0, split: Split = "held_out") -> list[Task]:
    """Draw ``n`` tasks of ``kind`` with ``n`` different prompts."""
    rng = random.Random(f"{kind}:{seed}")
    tasks: dict[str, Task] = {}
    while len(tasks) < n:
        task = make_task(kind, rng, split)
        tasks[task.prompt] = task
    return list(tasks.values())


# --- texts ---------------------------------------------------------------------------------------


def _string(rng: random.Random, alphabet: str, low: int, high: int) -> str:
    """A random string of ``low`` to ``high`` characters of ``alphabet``."""
    return "".join(rng.choices(alphabet, k=rng.randint(low, high)))


def _word(rng: random.Random, low: int = 3, high: int = 10) -> str:
    """An English word, or as often a string of random letters."""
    return rng.choice(world.WORDS) if rng.random() < 0.5 else _string(rng, _LETTERS, low, high)


def _sentence(rng: random.Random) -> str:
    """English words in no order, with a capital and a full stop."""
    return " ".join(rng.choices(world.WORDS, k=rng.randint(3, 9))).capitalize() + "."


def _foreign_word(rng: random.Random) -> str:
    first, last = rng.choice(_FOREIGN)
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))


def _text(rng: random.Random) -> str:
    """Up to about 70 characters: words, a sentence, or random characters; no space at the ends."""
    style = rng.random()
    if style < 0.35:
        return " ".join(rng.choices(world.WORDS, k=rng.randint(1, 9)))
    if style < 0.5:
        return _sentence(rng)
    if style < 0.8:
        return " ".join(_string(rng, _PLAIN, 1, 10) for _ in range(rng.randint(1, 5)))
    return " ".join(_string(rng, _PLAIN + _PUNCTUATION, 1, 12) for _ in range(rng.randint(1, 4)))


# --- tasks ---------------------------------------------------------------------------------------


def _copy(rng: random.Random) -> _Problem:
    if rng.random() < 0.15:
        text = " ".join(_foreign_word(rng) for _ in range(rng.randint(1, 4)))
    else:
        text = _text(rng)
    ask = rng.choice(("Copy: ", "Repeat after me: ", "Echo this: ", "Say exactly: "))
    return _Problem(text, ask + text, text)


def _upper(rng: random.Random) -> _Problem:
    text = _text(rng)
    ask = rng.choice(("Uppercase: ", "Write in capitals: ", "Convert to upper case: ", "Shout: "))
    return _Problem(text, ask + text, text.upper())


def _reverse(rng: random.Random) -> _Problem:
    style = rng.random()
    if style < 0.4:
        text = rng.choice(world.WORDS)
    elif style < 0.6:
        text = " ".join(rng.choices(world.WORDS, k=2))
    elif style < 0.8:
        text = _string(rng, _LETTERS, 1, 14)
    else:
        text = _string(rng, _PLAIN, 1, 14)
    ask = rng.choice(
        ("Reverse: {}", "Spell {} backwards.", "Write {} in reverse.", "Reverse the letters of {}.")
    )
    return _Problem(text, ask.format(text), text[::-1])


def _sort(rng: random.Random) -> _Problem:
    ask = rng.choice(("Sort the {}: {}", "Put the {} in order: {}", "Order the {}: {}"))
    style = rng.random()
    if style < 0.34:
        letters = _string(rng, _LETTERS, 2, 10)
        return _Problem(letters, ask.format("letters", letters), "".join(sorted(letters)))
    if style < 0.67:
        words = rng.sample(world.WORDS, rng.randint(2, 5))
        text = " ".join(words)
        return _Problem(text, ask.format("words", text), " ".join(sorted(words)))
    numbers = [rng.randrange(rng.choice((10, 100, 1000))) for _ in range(rng.randint(2, 6))]
    text = " ".join(map(str, numbers))
    return _Problem(text, ask.format("numbers", text), " ".join(map(str, sorted(numbers))))


def _operand(rng: random.Random) -> int:
    """A number of one to four digits, each length as likely."""
    digits = rng.randint(1, 4)
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _add(rng: random.Random) -> _Problem:
    a, b = _operand(rng), _operand(rng)
    ask = rng.choice(("What is {} + {}?", "Calculate {} + {}.", "{} + {} =", "Add {} and {}."))
    return _Problem(f"{min(a, b)}+{max(a, b)}", ask.format(a, b), str(a + b))


def _subtract(rng: random.Random) -> _Problem:
    a, b = _operand(rng), _operand(rng)
    if a < b and rng.random() < 0.7:
        a, b = b, a
    ask = rng.choice(
        ("What is {0} - {1}?", "Calculate {0} - {1}.", "{0} - {1} =", "Subtract {1} from {0}.")
    )
    return _Problem(f"{a}-{b}", ask.format(a, b), str(a - b))


def _count(rng: random.Random) -> _Problem:
    style = rng.random()
    if style < 0.2:
        word = _word(rng, 1, 14)
        ask = rng.choice(("How many letters are in {}?", "Count the letters of {}."))
        return _Problem(word, ask.format(word), str(len(word)))
    if style < 0.4:
        word = _string(rng, _string(rng, _LETTERS, 3, 8), 3, 12)
        letter = rng.choice(word)
        ask = rng.choice(("How many times does {} occur in {}?", "Count the letter {} in {}."))
        return _Problem(f"{letter} {word}", ask.format(letter, word), str(word.count(letter)))
    step = rng.choice((1, 1, 1, 2, 3, 5, 10))
    first = rng.randint(0, 150)
    last = first + step * rng.randint(1, 24)
    if rng.random() < 0.3:
        first, last, step = last, first, -step
        ask = rng.choice(("Count down from {} to {}{}.", "Count backwards from {} to {}{}."))
    else:
        ask = rng.choice(("Count from {} to {}{}.", "List the numbers from {} to {}{}."))
    by = "" if abs(step) == 1 else f" by {abs(step)}"
    numbers = range(first, last + (1 if step > 0 else -1), step)
    return _Problem(
        f"{first} {last} {step}", ask.format(first, last, by), " ".join(map(str, numbers))
    )


def _qa(rng: random.Random) -> _Problem:
    if rng.random() < 0.25:
        questions, answer = rng.choice(world.KNOWLEDGE)
        question = rng.choice(questions)
        return _Problem(question, question, answer)
    relations = rng.sample(world.RELATIONS, rng.randint(1, 3))
    facts = []
    for relation in relations:
        n = rng.randint(1, 4)
        people, values = rng.sample(world.NAMES, n), rng.sample(relation.values, n)
        facts += [(relation, name, value) for name, value in zip(people, values, strict=True)]
    rng.shuffle(facts)
    story = " ".join(relation.fact.format(n=name, v=value) for relation, name, value in facts)
    relation, name, value = rng.choice(facts)
    fact = relation.fact.format(n=name, v=value)
    style = rng.random()
    if style < 0.5:
        question, answer = relation.ask_value.format(n=name), fact
    elif style < 0.8:
        question, answer = relation.ask_name.format(v=value), fact
    elif style < 0.9:
        question, answer = f"Is it true that {fact[:-1]}?", "Yes."
    else:
        other = rng.choice([v for v in relation.values if v != value])
        question = f"Is it true that {relation.fact.format(n=name, v=other)[:-1]}?"
        answer = f"No. {fact}"
    prompt = f"{story} {question}"
    return _Problem(prompt, prompt, answer)


def _recall_within(low: int, high: int) -> Callable[[random.Random], _Problem]:
    """Recall with ``low`` to ``high`` characters (bytes, tokens) from the fact to the question."""

    def draw(rng: random.Random) -> _Problem:
        line, ask = rng.choice(
            (
                ("The code of {} is {}.", "What is the code of {}?"),
                ("{} = {};", "What is {}?"),
                ("Remember that {} means {}.", "What does {} mean?"),
            )
        )
        value_alphabet = rng.choice((_DIGITS, _LETTERS))
        filler = rng.choice((0.0, 0.3, 0.9))
        used: set[str] = set()

        def entry() -> tuple[str, str]:
            while (key := _word(rng, 3, 6)) in used:
                pass
            used.add(key)
            return key, _string(rng, value_alphabet, 3, 6)

        def lines(length: int) -> list[str]:
            out: list[str] = []
            while length > 0:
                text = _sentence(rng) if rng.random() < filler else line.format(*entry())
                out.append(text)
                length -= len(text) + 1
            return out

        key, value = entry()
        before, after = rng.choice((0, 40, 150)), rng.randint(low, high)
        story = [*lines(before), line.format(key, value), *lines(after)]
        prompt = " ".join([*story, ask.format(key)])
        return _Problem(f"{key}={value}", prompt, value)

    return draw


TASKS: dict[str, Callable[[random.Random], _Problem]] = {
    "recall": _recall_within(50, 600),
    "recall_long": _recall_within(600, 1500),
    "copy": _copy,
    "reverse": _reverse,
    "upper": _upper,
    "sort": _sort,
    "add": _add,
    "subtract": _subtract,
    "count": _count,
    "qa": _qa,
}
"""The tasks by name. ``make_task`` and ``make_tasks`` draw from them."""
