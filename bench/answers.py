"""Greedy answers of a real model beside llama-server's, token for token, each request alone."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from math import inf
from typing import Any

import httpx

from bench import harness
from bench.arms import InProcess
from bench.cache import cache_folder
from bench.case import Arm, Case, Measured, cases_of
from bench.options import add_model, add_run, choose
from bench.serving import ServerProcess
from bench.targets import Target, worst_detail
from bench.tools import tool
from bench.views import Column, by_arm
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.results import Result
from pyllamabatch.llama.model import Model
from pyllamabatch.report.records import Record
from pyllamabatch.step.sampling_params import SamplingParams

QUICK = {"requests": 8, "tokens": 8}
N_CTX = 4096
NEAR = 0.05
"""Nats between the two tokens: of so near ones either may be the larger by rounding alone."""
TOP = 5  # log-probabilities of each token that both sides tell

TARGETS = (
    Target(
        "answers that differ from llama-server's, and not at a near tie",
        worst_detail("wrong"),
        at_most=0,
        must=True,
    ),
    Target("answers that differ at a near tie, of 50", worst_detail("near_ties"), at_most=5),
)

Message = dict[str, str]
THINGS = (
    "rain", "the moon", "bread", "a bicycle", "Paris", "chess", "the heart", "gold", "a library",
    "Python",
)  # fmt: skip
QUESTIONS = (
    "What is {}?", "Tell me a short story about {}.", "List three facts about {}.",
    "Explain {} to a child.", "Write one sentence that begins with: In the case of {},",
)  # fmt: skip
OPENINGS = (
    "The most important thing about {} is", "Once upon a time there was {}, and", "Q: {}?\nA:",
    "# Notes on {}\n\n1.", "Everyone knows that {}",
)  # fmt: skip
SYSTEM = "You answer in plain words."
PARAGRAPH = "People have thought about {} for a long time, and they do not agree. "
N_LONG = 40  # such sentences in front of a long prompt: more than the device computes at once


def chats() -> Iterator[list[Message]]:
    """Of one turn, and every fifth of three; every other one has a system message."""
    for i, (question, thing) in enumerate(product(QUESTIONS, THINGS)):
        messages = [{"role": "system", "content": SYSTEM}] if i % 2 else []
        if i % 5 == 4:
            messages.append({"role": "user", "content": f"Do you like {thing}?"})
            messages.append({"role": "assistant", "content": f"Yes. I like {thing} very much."})
        yield [*messages, {"role": "user", "content": question.format(thing)}]


def completions() -> Iterator[str]:
    """Every tenth has a long prompt."""
    for i, (opening, thing) in enumerate(product(OPENINGS, THINGS)):
        yield (PARAGRAPH.format(thing) * N_LONG if i % 10 == 9 else "") + opening.format(thing)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, model="smollm2-135m", kv="unified")
    parser.add_argument("--requests", type=int, default=50, help="chats, and as many completions")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer at most")
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.add_argument("--chat-template", help="a name, for a model without a template")
    # With more threads the engine gives one up that has no core, and a long row's attention is
    # divided among those that there are.
    parser.set_defaults(sampling="greedy", threads=1)
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    """1 when an answer differs where no near tie is."""
    inside = InProcess.of(options)
    n, template = options.requests, options.chat_template
    arms = [
        Arm("completions", "texts as they are", partial(compare, inside.model, completions, n)),
        Arm("chats", "the model's chat template", partial(compare, inside.model, chats, n)),
    ]
    case, *_ = cases_of(options, inside.file, 1, options.tokens, [1])
    with serving(case, template) as server:
        chosen = choose(options.arms, arms)
        work = [Arm(arm.name, arm.includes, partial(arm.run, server, template)) for arm in chosen]
        title = f"{n} greedy answers beside llama-server's"
        return harness.run(options, work, [case], inside.facts(), title)


def view(records: Sequence[Record]) -> str:
    names = ("answers", "tokens", "same", "near_ties", "wrong")
    columns = [Column(name.replace("_", " "), name, ".0f") for name in names]
    return by_arm(records, [*columns, Column("widest tie, nats", "widest_tie", ".4f")])


@dataclass(frozen=True)
class Answer:
    """Tokens, with the one that ended it, and of each the log-probabilities of the most likely ones
    (the engine has none of the last)."""

    tokens: list[int]
    tops: list[dict[int, float]]


def compare(
    model: Model,
    prompts: Callable[[], Iterator[Any]],
    n: int,
    server: httpx.Client,
    template: str | None,
    case: Case,
) -> Measured:
    """How many of the first `n` answers are the same, and how far apart the two tokens are where
    the others leave llama-server's."""
    seen = dict.fromkeys(("answers", "tokens", "same", "near_ties", "wrong"), 0.0)
    widest = 0.0
    with Engine(
        model,
        n_seq_max=1,
        speculate=None,
        n_ctx=N_CTX,
        n_batch=case.n_batch,
        n_ubatch=case.n_ubatch,
        n_threads=case.n_threads,
        n_threads_batch=case.n_threads,
        flash_attn_type="enabled",
        prefix_cache=False,
        cost=None,
    ) as engine:
        for i, prompt in enumerate(islice(prompts(), n)):
            mine = answered(ask_engine(engine, prompt, template, case.tg))
            its = ask_server(server, prompt, case.tg)
            seen["answers"] += 1
            seen["tokens"] += len(its.tokens)
            if mine.tokens == its.tokens:
                seen["same"] += 1
                continue
            at, gap = parting(mine, its)
            widest = max(widest, gap)
            seen["near_ties" if gap <= NEAR else "wrong"] += 1
            print(f"{i}: {gap:.4f} nats apart at token {at}: {prompt!r:.100}", file=sys.stderr)
    settings = {"n_kv_max": N_CTX, "flash_attn": 1, "kv_unified": True}
    return Measured(0.0, 0.0, settings, {**seen, "widest_tie": widest})


def ask_engine(engine: Engine, prompt: Any, template: str | None, n: int) -> Result:
    params = SamplingParams(temperature=0, max_tokens=n, logprobs=TOP)
    if isinstance(prompt, str):
        return engine.submit(prompt, params).result()
    return engine.chat(prompt, params, template=template).result


def answered(result: Result) -> Answer:
    assert result.top_logprobs is not None
    end = [result.stop] if isinstance(result.stop, int) else []
    return Answer(result.tokens + end, result.top_logprobs)


def ask_server(server: httpx.Client, prompt: Any, n: int) -> Answer:
    """ValueError for an answer without log-probabilities."""
    body: dict[str, Any] = {"temperature": 0, "cache_prompt": False}
    if isinstance(prompt, str):
        body |= {"prompt": prompt, "n_predict": n, "n_probs": TOP}
        answer = server.post("/completion", json=body).raise_for_status().json()
        each = answer["completion_probabilities"]
    else:
        body |= {"messages": prompt, "max_tokens": n, "logprobs": True, "top_logprobs": TOP}
        answer = server.post("/v1/chat/completions", json=body).raise_for_status().json()
        each = answer["choices"][0]["logprobs"]["content"]
    tops = [{top["id"]: float(top["logprob"]) for top in one["top_logprobs"]} for one in each]
    return Answer([one["id"] for one in each], tops)


def parting(mine: Answer, its: Answer) -> tuple[int, float]:
    """The first token that is not the same, and the nats between the two there, on the side where
    they are further apart. Infinite where one is not among the other's most likely, and where one
    answer is a prefix of the other."""
    both = zip(mine.tokens, its.tokens, strict=False)
    at = next((i for i, (a, b) in enumerate(both) if a != b), None)
    if at is None:
        return min(len(mine.tokens), len(its.tokens)), inf
    tops = [answer.tops[at] for answer in (mine, its) if at < len(answer.tops)]
    ids = mine.tokens[at], its.tokens[at]
    if not all(token in top for top in tops for token in ids):
        return at, inf
    return at, max(abs(top[ids[0]] - top[ids[1]]) for top in tops)


@contextmanager
def serving(case: Case, template: str | None) -> Iterator[httpx.Client]:
    """llama-server with one slot, and what would compute a prompt in other pieces switched off."""
    command = [
        tool("llama-server"), "--model", case.model.path, "--parallel", 1, "--ctx-size", N_CTX,
        "--batch-size", case.n_batch, "--ubatch-size", case.n_ubatch, "--threads", case.n_threads,
        "--threads-batch", case.n_threads, "--flash-attn", "on", "--cache-ram", 0,
        "--ctx-checkpoints", 0, "--fit", "off", "--kv-unified",
    ]  # fmt: skip
    if template is not None:
        command += ["--chat-template", template, "--no-jinja"]  # or the name would be the template
    log = cache_folder("logs") / "answers.log"
    server = ServerProcess([str(word) for word in command], log)
    try:
        with httpx.Client(base_url=server.url, timeout=600, trust_env=False) as client:
            yield client
    finally:
        server.stop()
