"""A soak with real weights: every answer is the one that its request has alone.

    python -m tools.soak --minutes 60            # SmolLM2, 64 clients
    python -m tools.soak --minutes 2 --model default

Each client draws a request again and again: greedy or with a seed, with a JSON schema, with a LoRA
adapter, or an interactive sequence that moves to another one by a snapshot. Some are cancelled,
some have a deadline, and contexts are broken on purpose: the engine restarts. It prints a line of
JSON, and ends with 1 where an answer differs, a request fails, one is left, nothing was restarted,
or memory grows.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from bench.models import resolve
from bench.soak import resident
from pyllamabatch import Engine, LoraAdapter, Model, SamplingParams
from pyllamabatch.engine.options import Options
from tests.support.faults import set_fault
from tests.support.models_special import write_lora

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TEXTS = (
    "Why is the sky blue?", "Name a river.", "The tide comes in twice a day, and each time",
    "A short poem about bread:", "Two and two are", "List three birds.",
)  # fmt: skip
TOKENS = 12
FATAL = -3  # llama_decode's code of a backend that failed
PARTS = 5  # of the time: what is resident in the first one has not settled yet
GROWN_MIB = 64  # median of what is resident in the last part over that of the second one, at most


@dataclass(frozen=True)
class Asked:
    """A request. kind: "text", "lora" or "snapshot"."""

    kind: str
    prompt: str
    params: SamplingParams

    @property
    def options(self) -> Options:
        return {"lora": "style"} if self.kind == "lora" else {}


def requests() -> list[Asked]:
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eog=True)
    found: list[Asked] = []
    for i, text in enumerate(TEXTS):
        drawn = SamplingParams(temperature=0.9, seed=i, max_tokens=TOKENS, ignore_eog=True)
        schema = SamplingParams(temperature=0.7, seed=i, max_tokens=TOKENS, json_schema=SCHEMA)
        found += [Asked("text", text, params) for params in (greedy, drawn, schema)]
        found += [Asked("lora", text, greedy), Asked("snapshot", text, drawn)]
    return found


class Soak:
    """Clients of one engine, and what they have seen."""

    def __init__(self, engine: Engine, expected: Sequence[tuple[Asked, list[int]]]) -> None:
        self._engine, self._expected = engine, expected
        self._lock, self.seen = threading.Lock(), Counter[str]()

    def client(self, seed: int, until: float) -> None:
        dice = random.Random(seed)
        while time.monotonic() < until:
            asked, tokens = dice.choice(self._expected)
            if asked.kind == "snapshot":
                reason, got = "length", self._moved(asked, dice.randrange(1, TOKENS))
            else:
                reason, got = self._submitted(asked, dice)
            cut = reason in ("cancelled", "deadline")
            with self._lock:
                self.seen[reason] += 1
                self.seen[f"kind: {asked.kind}"] += 1
                if got != (tokens[: len(got)] if cut else tokens):
                    self.seen["wrong"] += 1
                    print(f"{asked}: {reason} {got}, not {tokens}", file=sys.stderr)

    def _submitted(self, asked: Asked, dice: random.Random) -> tuple[str, list[int]]:
        options = asked.options
        if dice.random() < 0.1:
            options["timeout"] = dice.random() * 5
        stream = self._engine.submit(asked.prompt, asked.params, **options)
        if dice.random() < 0.1:
            time.sleep(dice.random())
            stream.cancel()
        result = stream.result(600)
        return result.finish_reason, result.tokens

    def _moved(self, asked: Asked, n_before: int) -> list[int]:
        """Tokens of two sequences: the second goes on from a snapshot of the first."""
        with self._engine.sequence(asked.params) as first:
            first.prompt(asked.prompt)
            tokens = [first.sample().token for _ in range(n_before)]
            saved = first.snapshot()
        with self._engine.sequence(asked.params) as second:
            second.restore(saved)
            return tokens + [second.sample().token for _ in range(TOKENS - n_before)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--fault-every", type=float, default=20, metavar="S")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Model(resolve(options.model).path) as model:
        adapter = Path(folder) / "style.gguf"
        write_lora(adapter, model.architecture, model.n_embd)
        with Engine(
            model,
            n_seq_max=16,
            n_ctx=16 * 256,
            batch_invariant=True,
            max_restarts=1_000_000,
            loras={"style": LoraAdapter(model, adapter)},
        ) as engine:
            return soak(engine, options)


def soak(engine: Engine, options: argparse.Namespace) -> int:
    expected = [
        (asked, engine.submit(asked.prompt, asked.params, **asked.options).result(600).tokens)
        for asked in requests()
    ]
    run = Soak(engine, expected)
    begin = time.monotonic()
    until = begin + 60 * options.minutes
    memory: list[int] = []
    with ThreadPoolExecutor(options.clients) as pool:
        clients = [pool.submit(run.client, seed, until) for seed in range(options.clients)]
        while time.monotonic() < until and not any(client.done() for client in clients):
            time.sleep(min(options.fault_every, max(0.0, until - time.monotonic())))
            memory.append(resident())
            with engine._core.state:
                set_fault(engine._stepper, 1, FATAL, 2, 2)  # twice: a lone one is only tried again
        for client in clients:
            client.result()
    stats = engine.stats()
    parts = [round(median(part) / 2**20, 1) for part in np.array_split(memory, PARTS) if len(part)]
    grown = parts[-1] - parts[min(1, len(parts) - 1)]
    print(
        json.dumps({
            "minutes": round((time.monotonic() - begin) / 60, 1), **dict(sorted(run.seen.items())),
            "wrong": run.seen["wrong"], "errors": stats.finished["error"],
            "restarts": stats.restarts, "preemptions": stats.preemptions,
            "left": stats.running + stats.waiting,
            "resident_mib": parts, "grown_mib": round(grown, 1),
        })
    )  # fmt: skip
    faults = run.seen["wrong"] + stats.finished["error"] + stats.running + stats.waiting
    return int(faults > 0 or stats.restarts == 0 or grown > GROWN_MIB)


if __name__ == "__main__":
    sys.exit(main())
