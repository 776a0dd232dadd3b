"""Speculative decoding on and off: texts that repeat their prompt, and free chats.

In each run N texts of the set (`bench/texts`) are asked at once, and answered until they end or
have `--tokens` tokens. What repeats its prompt is answered greedily, chats with the default
sampling: the tokens are the same with drafts and without, but for rounding. The arms take turns on
the same texts.

`t_pp` is the time until every sequence has its first token, `t_tg` the rest, for `--tokens` tokens
each at the speed of what was sampled then: so no prompt is in the speed.
"""

from __future__ import annotations

import argparse
import json
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from bench import harness
from bench.arms import InProcess
from bench.cache import cache_folder
from bench.case import I32, Case, Measured, cases_of
from bench.options import add_model, add_run, choose, numbers
from bench.serve import ServeArm, llama_server, measure
from bench.serving import Clients, EngineClients, HttpClients, ServerProcess
from bench.targets import Target, speed_ratio
from bench.texts import FREE, texts
from bench.tools import tool
from bench.views import Column, by_arm, speed_table
from pyllamabatch.compare.case import request_body
from pyllamabatch.compare.clients import at_once
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model
from pyllamabatch.report.records import Record
from pyllamabatch.step.sampling_params import SamplingParams

OFF, NGRAM, DRAFT, SERVER = "off", "ngram", "draft", "llama-server-ngram"
REPEATING = "repeating"
SAMPLING = {REPEATING: "greedy", FREE: "default"}
CELLS = 1024  # of each sequence
QUICK = {
    "model": "default",
    "sequences": "1,2",
    "tokens": 24,
    "repeats": 1,
    "arms": f"{OFF},{NGRAM}",
}


def _targets() -> Iterator[Target]:
    for kind, least in ((REPEATING, {1: 1.5, 2: 1.1}), (FREE, {})):
        for pl in (1, 2, 4, 8, 16):
            yield Target(
                f"{kind}, {pl} sequences: {NGRAM} over {OFF}",
                speed_ratio(NGRAM, OFF, pl),
                at_least=least.get(pl, 1.0 if kind == REPEATING else 0.98),
                where={"sampling": SAMPLING[kind]},
            )
            yield Target(
                f"{kind}, {pl} sequences: {NGRAM} over {SERVER}",
                speed_ratio(NGRAM, SERVER, pl),
                at_least=1.0,
                where={"sampling": SAMPLING[kind]},
            )


TARGETS = tuple(_targets())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, model="smollm2-135m")
    parser.add_argument("--sequences", default="1,2,4,8,16", help="at once; comma separated")
    parser.add_argument("--texts", default=f"{REPEATING},{FREE}", help="comma separated")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at most")
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.add_argument("--draft", metavar="FILE", help="a smaller model that drafts, for its arm")
    parser.set_defaults(sampling=SAMPLING[REPEATING])
    add_run(parser, repeats=6)


def main(options: argparse.Namespace) -> int:
    inside = InProcess.of(options)
    arms = choose(options.arms, all_arms(inside, drafter_of(options)))
    for name in dict.fromkeys(arm.tool for arm in arms if arm.tool):
        tool(name)
    kinds = options.texts.split(",")
    if unknown := [kind for kind in kinds if kind not in SAMPLING]:
        raise SystemExit(f"--texts {','.join(unknown)}: not one of {', '.join(SAMPLING)}")
    each = cases_of(options, inside.file, 0, options.tokens, numbers(options.sequences))
    cases = [
        replace(case, sampling=SAMPLING[kind], n_cells=CELLS) for case in each for kind in kinds
    ]
    return harness.show(
        options,
        measure(arms, cases, inside, options),
        len(arms) * len(cases) * options.repeats,
        f"{', '.join(kinds)}, answers of up to {options.tokens} tokens, generated tokens/s (ratio)",
    )


def view(records: Sequence[Record]) -> str:
    columns = (
        Column("right of drafted", "right", ".2f"),
        Column("tokens a step and sequence", "per_step", ".2f"),
        Column("all in, tokens/s", "all_in", ".1f"),
        Column("s until all had a token", lambda record: record.t_pp, ".2f"),
    )
    tables = []
    for kind, sampling in SAMPLING.items():
        mine = [record for record in records if record.sampling == sampling]
        if not mine:
            continue
        tables.append(f"{kind}\n\n{speed_table(mine, OFF, 'sequences')}")
        for pl in sorted({record.pl for record in mine}):
            of = [record for record in mine if record.pl == pl]
            tables.append(f"{kind}, {pl} sequences\n\n{by_arm(of, columns)}")
    return "\n\n".join(tables)


def drafter_of(options: argparse.Namespace) -> str | None:
    """What the arm `draft` drafts from; None: there is no such arm."""
    if options.draft:
        return f"draft:{options.draft}"
    return "draft" if options.model == "default" else None


def all_arms(inside: InProcess, drafter: str | None) -> list[ServeArm]:
    def engine(case: Case, *, options: dict[str, Any]) -> EngineSpeculates:
        return EngineSpeculates(case, inside.model, options)

    def server(case: Case) -> ServerSpeculates:
        command = [*llama_server(case, backend_sampling=False), "--spec-type", "ngram-simple"]
        process = ServerProcess(command, cache_folder("logs") / f"{SERVER}.log")
        return ServerSpeculates(case, inside.model, process)

    includes = "Engine in this process, a thread for each reader; no HTTP"
    drafting = [ServeArm(DRAFT, includes, partial(engine, options={"speculate": drafter}))]
    return [
        ServeArm(OFF, includes, partial(engine, options={"speculate": None})),
        ServeArm(NGRAM, includes, partial(engine, options={"speculate": NGRAM})),
        *(drafting if drafter else []),
        ServeArm(
            SERVER,
            "a slot for each sequence, --spec-type ngram-simple; httpx clients, streamed",
            server,
            tool="llama-server",
        ),
    ]


class Speculates(Clients):
    """N texts at once; `tokens_of` of each."""

    def __init__(self, case: Case, model: Model) -> None:
        self.case = case
        kind = REPEATING if case.sampling == SAMPLING[REPEATING] else FREE
        own = [text.prompt for text in texts() if (text.kind == FREE) == (kind == FREE)]
        self._prompts = [prompt_of(model, prompt) for prompt in mixed(own)]

    @abstractmethod
    def times(self, prompt: I32, tokens: int, seed: int) -> Iterator[float]:
        """When each token of an answer comes."""

    def counts(self) -> dict[str, float]:
        """What it has drafted and computed so far."""
        return {}

    def warm_up(self) -> None:
        list(self.times(self._prompts[-1][:32], 4, 0))

    def run(self, repeat: int) -> Measured:
        case, n = self.case, self.case.pl
        before = self.counts()

        def client(i: int, began: float) -> list[float]:
            which = (repeat * n + i) % len(self._prompts)
            return list(self.times(self._prompts[which], case.tg, case.seed + which))

        at_once(n, lambda i, began: self.connect(), self.give_up)
        began, came = at_once(n, client, self.give_up)
        there = max(times[0] for times in came)
        end = max(times[-1] for times in came)
        n_all, n_after = sum(map(len, came)), sum(t > there for times in came for t in times)
        speed = n_after / (end - there)
        detail = {"tokens": float(n_all), "all_in": n_all / (end - began)}
        counts = {name: value - before[name] for name, value in self.counts().items()}
        if counts.get("drafted"):
            detail["right"] = counts["accepted"] / counts["drafted"]
        if counts.get("sequence_steps"):
            detail["per_step"] = n_all / counts["sequence_steps"]
        return Measured(there - began, case.tg * n / speed, detail=detail | counts)

    def give_up(self) -> None:
        self.close(now=True)


class EngineSpeculates(Speculates, EngineClients):
    def __init__(self, case: Case, model: Model, options: dict[str, Any]) -> None:
        super().__init__(case, model)
        self._engine = Engine(
            model,
            n_seq_max=case.pl,
            n_ctx=case.n_ctx,
            n_threads=case.n_threads,
            n_threads_batch=case.n_threads,
            **options,
        )

    def times(self, prompt: I32, tokens: int, seed: int) -> Iterator[float]:
        greedy = {"temperature": 0.0} if self.case.sampling == "greedy" else {}
        params = SamplingParams(max_tokens=tokens, seed=seed, **cast(Any, greedy))
        for _ in self._engine.submit(prompt, params):
            yield time.perf_counter()

    def counts(self) -> dict[str, float]:
        stats = self._engine.stats()
        return {
            "drafted": float(stats.drafted_tokens),
            "accepted": float(stats.accepted_tokens),
            "sequence_steps": float(sum(n * steps for n, steps in stats.fill.items())),
        }


class ServerSpeculates(Speculates, HttpClients):
    def __init__(self, case: Case, model: Model, process: ServerProcess) -> None:
        HttpClients.__init__(self, case, model.n_vocab, process, 300.0)
        Speculates.__init__(self, case, model)
        self._body = request_body(case.sampling) | {
            "cache_prompt": False,
            "ignore_eos": False,
            "stream": True,
        }
        self._timings = {"drafted": 0.0, "accepted": 0.0}

    def times(self, prompt: I32, tokens: int, seed: int) -> Iterator[float]:
        own = {"prompt": prompt.tolist(), "n_predict": tokens, "seed": seed, "return_tokens": True}
        with self._http.stream("POST", "/completion", json=self._body | own) as answer:
            answer.raise_for_status()
            n_before = 0
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                values = json.loads(line[6:])
                n = (
                    values["tokens_predicted"] - n_before
                    if values["stop"]
                    else len(values["tokens"])
                )
                n_before += n
                yield from [time.perf_counter()] * n
                timings = values.get("timings", {}) if values["stop"] else {}
                self._timings["drafted"] += timings.get("draft_n", 0)
                self._timings["accepted"] += timings.get("draft_n_accepted", 0)

    def counts(self) -> dict[str, float]:
        return dict(self._timings)


def mixed(prompts: Sequence[str]) -> list[str]:
    """Those of one kind are neighbours in the set; here they are not."""
    third = -(-len(prompts) // 3)
    return [prompts[i] for at in range(third) for i in range(at, len(prompts), third)]


def prompt_of(model: Model, text: str) -> I32:
    """As the model's own template has it; plain text where it has none."""
    vocab = model.vocab
    if model.chat_template() is None:
        return vocab.tokenize(f"{text}\n\n")
    chat = vocab.apply_chat_template([{"role": "user", "content": text}])
    return vocab.tokenize(chat, add_special=False, parse_special=True)
