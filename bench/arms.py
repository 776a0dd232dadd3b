"""The arms of the decode comparison, and what their time contains.

Every arm does the same work: `pl` prompts of `pp` random tokens, then `tg` timed decode steps of
`pl` rows. The prompts and, where an arm samples, the first sample are not in the decode time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import harness
from bench.case import Case, Measured, ModelFile
from bench.models import resolve
from bench.tools import ToolError, build_options, tool
from pyllamabatch.compare.case import sampling_params
from pyllamabatch.compare.loop import Loop
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import Plan, Policy, StepView, sarathi
from pyllamabatch.step.stepper import SAMPLE, Stepper

ATTEMPTS = 5


def batched_bench_row(command: list[str]) -> dict[str, Any]:
    """The tool's one JSON line. It logs from a thread that it does not wait for at its end, so a
    short run on a busy machine may print nothing: such a run is repeated."""
    for _ in range(ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode == 0 and len(lines) == 1:
            values: dict[str, Any] = json.loads(lines[0])
            return values
        if done.returncode != 0:
            break
    tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
    raise ToolError(f"{' '.join(command)} gave no result:\n{tail}")


def run_batched_bench(case: Case) -> Measured:
    """llama-batched-bench in a process of its own; its model loading and warm-up are untimed."""
    binary = tool("llama-batched-bench", log=False)
    command = [
        str(binary), "-m", str(case.model.path), "-c", str(case.n_ctx),
        "-b", str(case.n_batch), "-ub", str(case.n_ubatch),
        "-npp", str(case.pp), "-ntg", str(case.tg), "-npl", str(case.pl),
        "-t", str(case.n_threads), "-tb", str(case.n_threads),
        "-kvu" if case.kv_unified else "-no-kvu", "--output-format", "jsonl",
    ]  # fmt: skip
    if case.n_gpu_layers >= 0:
        command += ["-ngl", str(case.n_gpu_layers)]
    values = batched_bench_row(command)
    names = ("n_kv_max", "n_batch", "n_ubatch", "flash_attn", "n_threads", "n_threads_batch")
    settings: dict[str, Any] = {name: int(values[name]) for name in names}
    settings["build_options"] = build_words()
    return Measured(values["t_pp"], values["t_tg"], settings)


def build_words() -> str:
    """The options that llama.cpp's tools are built with."""
    return " ".join(f"{k}={v}" for k, v in sorted(build_options().items()))


class StepClock:
    """A policy that asks another one and notes when steady steps begin: steps in which `n`
    sequences decode and there is no other. A plan may stand for several of them: `starts` has the
    time of each plan, `steps` how many steps were over then. `done` is set when `n_steps` are."""

    def __init__(self, policy: Policy, n: int, n_steps: int) -> None:
        self.starts: list[float] = []
        self.steps: list[int] = []
        self.done = threading.Event()
        self._policy = policy
        self._n = n
        self._n_steps = n_steps
        self._first = 0  # tokens that the first sequence had when it began

    def plan(self, view: StepView) -> Plan:
        plan = self._policy.plan(view)
        if len(view.decoding) != len(view.running) or len(view.running) != self._n or view.waiting:
            return plan
        if self.done.is_set():
            return plan
        generated = view.running[0].generated
        if not self.starts:
            self._first = generated
        self.starts.append(time.perf_counter())
        self.steps.append(generated - self._first)
        left = self._n_steps - self.steps[-1]
        if left == 0:
            self.done.set()
            return plan
        return plan._replace(repeat=min(plan.repeat, left))  # a plan begins where the time ends


class InProcess:
    """The arms that run in this process; the model is loaded once."""

    def __init__(self, file: ModelFile, n_gpu_layers: int, **load: Any) -> None:
        self.file = file
        self.model = Model(file.path, n_gpu_layers=n_gpu_layers, **load)

    @classmethod
    def of(cls, options: argparse.Namespace) -> InProcess:
        """By the options of `add_model`."""
        mtp = getattr(options, "draft", None) == "mtp"
        return cls(resolve(options.model), options.gpu_layers, load_mtp=mtp)

    def facts(self) -> dict[str, Any]:
        """The build's and the model's part of a record."""
        return harness.facts_of(self.model)

    def raw(self, case: Case) -> Measured:
        """The loop of docs/reference/raw.md: cffi calls only, libllama's sampler chains."""
        with self.context(case) as context:
            prompts = case.prompts(self.model.n_vocab)
            loop = Loop(context, case.sampling)
            try:
                start = time.perf_counter()
                for seq, prompt in enumerate(prompts.tolist()):
                    loop.start(seq, prompt, case.seed + seq)
                while loop.prefilling:
                    loop.step(decode=False)
                begin = time.perf_counter()
                for _ in range(case.tg):
                    loop.step()
                end = time.perf_counter()
            finally:
                loop.close()
        return Measured(begin - start, end - begin)

    def stepper(self, case: Case) -> Measured:
        """One plb_step per step through the Python face."""
        n = case.pl
        with self.context(case) as context, Stepper(context) as stepper:
            rows = stepper.rows
            start = time.perf_counter()
            token = compute_prompts(stepper, case)
            rows.seq[:n], rows.flags[:n] = np.arange(n), SAMPLE
            begin = time.perf_counter()
            for step in range(case.tg):
                rows.token[:n] = token
                rows.pos[:n] = case.pp + step
                result = stepper.step(n)
                result.raise_for_code()
                token[:] = result.token
            end = time.perf_counter()
        return Measured(begin - start, end - begin)

    def c_loop(self, case: Case) -> Measured:
        """All steps in one plb_run."""
        with self.context(case) as context, Stepper(context, n_steps_max=case.tg) as stepper:
            start = time.perf_counter()
            compute_prompts(stepper, case)
            begin = time.perf_counter()
            result = stepper.run(range(case.pl), case.tg)
            end = time.perf_counter()
            if result.n_steps != case.tg:
                raise RuntimeError(f"the run ended after {result.n_steps} of {case.tg} steps")
        return Measured(begin - start, end - begin)

    def engine(self, case: Case) -> Measured:
        """The engine; time runs between the plans of its steady steps."""
        clock = StepClock(sarathi(), case.pl, case.tg)
        with Engine(self.model, policy=clock, speculate=None, **case.context_params()) as engine:
            prompts = case.prompts(self.model.n_vocab)
            room = case.n_ctx // case.pl - case.pp
            start = time.perf_counter()
            with engine._core.state:  # none ends before the last one comes
                streams = [
                    engine.submit(prompt, sampling_params(case.sampling, case.seed + seq, room))
                    for seq, prompt in enumerate(prompts)
                ]
            reached = clock.done.wait(timeout=600)
            for stream in streams:
                stream.cancel()
            if not reached:
                raise RuntimeError(f"only {clock.steps[-1:]} steady steps in 600 s")
        starts = clock.starts
        return Measured(
            starts[0] - start,
            starts[-1] - starts[0],
            detail={"longest_step_s": float((np.diff(starts) / np.diff(clock.steps)).max())},
        )

    def context(self, case: Case) -> Any:
        return Context(self.model, **case.context_params())


def compute_prompts(stepper: Stepper, case: Case) -> npt.NDArray[np.int32]:
    """Slots for the case's sequences and their prompts, in steps of n_batch rows; the first token
    of each, sampled."""
    n, rows = case.pl, stepper.rows
    token = np.zeros(n, np.int32)
    for seq in range(n):
        stepper.set_slot(seq, sampling_params(case.sampling, case.seed + seq, case.tg + 2))
    prompts = case.prompts(stepper.n_vocab).reshape(-1)
    pos = np.tile(np.arange(case.pp, dtype=np.int32), n)
    seq_ids = np.repeat(np.arange(n, dtype=np.int32), case.pp)
    flags = np.where(pos == case.pp - 1, SAMPLE, 0).astype(np.uint8)
    for first in range(0, pos.size, case.n_batch):
        part = slice(first, first + case.n_batch)
        k = pos[part].size
        rows.token[:k], rows.pos[:k] = prompts[part], pos[part]
        rows.seq[:k], rows.flags[:k] = seq_ids[part], flags[part]
        result = stepper.step(k)
        result.raise_for_code()
        token[result.seq] = result.token
    return token
