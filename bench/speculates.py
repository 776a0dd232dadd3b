"""What `bench speculate` asks: N texts at once of an engine or of llama-server, and its times."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from bench.case import I32, Case, Measured
from bench.serving import Clients, EngineClients, HttpClients, ServerProcess, events_of
from bench.texts import FREE, texts
from bench.turns import EngineTurn, ProcessTurn, Turn, Turns
from pyllamabatch.compare.case import request_body
from pyllamabatch.compare.clients import at_once
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model
from pyllamabatch.models import default_model_path, default_prompts
from pyllamabatch.step.sampling_params import SamplingParams

OFTEN = 8  # a run of the embedded model's prompts is to last some turns
REPEATING = "repeating"
SAMPLING = {REPEATING: "greedy", FREE: "default"}


class SideBySide:
    """What answers the same texts of a case at once, in turns."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.members: list[Speculates] = []
        self._found: dict[Speculates, Future[Measured]] = {}

    def run(self, member: "Speculates", repeat: int) -> Measured:
        """The first one who asks waits for all of them, and begins: each in turn."""
        if member not in self._found:
            first = self.members.index(member)
            order = self.members[first:] + self.members[:first]
            with ThreadPoolExecutor(len(order)) as threads:
                self._found = {one: threads.submit(one.answer, repeat) for one in order}
        return self._found.pop(member).result()


class Speculates(Clients):
    """N texts at once. The embedded model, which knows none of the set, has its own prompts; their
    answers are short, so all of them are asked several times, one behind the other."""

    def __init__(self, case: Case, model: Model) -> None:
        self.case = case
        kind = REPEATING if case.sampling == SAMPLING[REPEATING] else FREE
        own = mixed([text.prompt for text in texts() if (text.kind == FREE) == (kind == FREE)])
        self._each = 1
        if embedded(case):
            own = [one.prompt for one in default_prompts()]
            self._each = -(-OFTEN * len(own) // case.pl)
        self._prompts = [prompt_of(model, prompt) for prompt in own]
        self.turn: Turn | None = None
        self._others: SideBySide | None = None

    def join(self, others: SideBySide, turn: Turn) -> None:
        """It runs when these do."""
        self._others, self.turn = others, turn
        others.members.append(self)

    def now(self) -> float:
        """Seconds, of its own clock where it takes turns with others."""
        return self.turn.seconds() if self.turn else time.perf_counter()

    @abstractmethod
    def times(self, prompt: I32, tokens: int, seed: int) -> Iterator[float]:
        """When each token of an answer comes."""

    def counts(self) -> dict[str, float]:
        """What it has drafted and computed so far."""
        return {}

    def warm_up(self) -> None:
        list(self.times(self._prompts[-1][:32], 4, 0))

    def run(self, repeat: int) -> Measured:
        return self._others.run(self, repeat) if self._others else self.answer(repeat)

    def answer(self, repeat: int) -> Measured:
        case, n = self.case, self.case.pl
        before = self.counts()
        cpu_seconds = self.turn.cpu_seconds if self.turn else time.process_time

        def client(i: int, began: float) -> list[tuple[float, float]]:
            """When its tokens came, and the CPU time of this process until then."""
            came = []
            for j in range(repeat * self._each, (repeat + 1) * self._each):
                which = (j * n + i) % len(self._prompts)
                times = self.times(self._prompts[which], case.tg, case.seed + which)
                came += [(at, cpu_seconds()) for at in times]
            return came

        at_once(n, lambda i, began: self.connect(), self.give_up)
        with self.turn or nullcontext():
            began = self.now()
            _, came = at_once(n, client, self.give_up)
        there, cpu = max(times[0] for times in came)
        end, cpu_end = max(times[-1] for times in came)
        n_all, n_after = sum(map(len, came)), [sum(at > there for at, _ in times) for times in came]
        # Seconds a token, as each reader sees it.
        each = [
            (times[-1][0] - there) / n_its
            for times, n_its in zip(came, n_after, strict=True)
            if n_its
        ]
        detail = {
            "tokens": float(n_all),
            "all_in": n_all / (end - began),
            "all_done": sum(n_after) / (end - there),
        }
        if not self.pids:  # it runs in this process
            detail["cpu_ms"] = 1e3 * (cpu_end - cpu) / sum(n_after)
        counts = {name: value - before[name] for name, value in self.counts().items()}
        if counts.get("drafted"):
            detail["right"] = counts["accepted"] / counts["drafted"]
        if counts.get("sequence_steps"):
            detail["per_step"] = n_all / counts["sequence_steps"]
            detail["rows_a_token"] = counts["decode_rows"] / n_all
        return Measured(there - began, case.tg * fmean(each), detail=detail | counts)

    def give_up(self) -> None:
        self.close(now=True)


class EngineSpeculates(Speculates, EngineClients):
    def __init__(
        self,
        case: Case,
        model: Model,
        options: dict[str, Any],
        others: SideBySide | None = None,
    ) -> None:
        super().__init__(case, model)
        self._engine = Engine(
            model,
            n_seq_max=case.pl,
            n_ctx=case.n_ctx,
            n_threads=case.n_threads,
            n_threads_batch=case.n_threads,
            prefix_cache=False,  # as llama-server's `cache_prompt`: what a text's second time saves
            **options,
        )
        if others:
            self.join(others, EngineTurn(others.turns, self._engine))

    def times(self, prompt: I32, tokens: int, seed: int) -> Iterator[float]:
        greedy = {"temperature": 0.0} if self.case.sampling == "greedy" else {}
        params = SamplingParams(max_tokens=tokens, seed=seed, **cast(Any, greedy))
        for _ in self._engine.submit(prompt, params):
            yield self.now()

    def counts(self) -> dict[str, float]:
        stats = self._engine.stats()
        return {
            "drafted": float(stats.drafted_tokens),
            "accepted": float(stats.accepted_tokens),
            "decode_rows": float(stats.decode_rows),
            "sequence_steps": float(sum(n * steps for n, steps in stats.fill.items())),
        }


class ServerSpeculates(Speculates, HttpClients):
    def __init__(
        self, case: Case, model: Model, process: ServerProcess, others: SideBySide
    ) -> None:
        HttpClients.__init__(self, case, model.n_vocab, process, 300.0)
        Speculates.__init__(self, case, model)
        self._body = request_body(case.sampling) | {
            "cache_prompt": False,
            "ignore_eos": False,
            "stream": True,
        }
        self._timings = {"drafted": 0.0, "accepted": 0.0}
        self.join(others, ProcessTurn(others.turns, process.pid))

    def times(self, prompt: I32, tokens: int, seed: int) -> Iterator[float]:
        own = {"prompt": prompt.tolist(), "n_predict": tokens, "seed": seed, "return_tokens": True}
        with self._http.stream("POST", "/completion", json=self._body | own) as answer:
            answer.raise_for_status()
            n_before = 0
            for values in events_of(answer):
                n = (
                    values["tokens_predicted"] - n_before
                    if values["stop"]
                    else len(values["tokens"])
                )
                n_before += n
                yield from [self.now()] * n
                timings = values.get("timings", {}) if values["stop"] else {}
                self._timings["drafted"] += timings.get("draft_n", 0)
                self._timings["accepted"] += timings.get("draft_n_accepted", 0)

    def counts(self) -> dict[str, float]:
        return dict(self._timings)


def embedded(case: Case) -> bool:
    return Path(case.model.path) == default_model_path()


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
