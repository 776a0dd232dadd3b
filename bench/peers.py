"""llama.cpp's tools that bring their own clients, as arms of `serve`."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from bench.arms import ATTEMPTS, run_batched_bench
from bench.case import Case, Measured
from bench.tools import ToolError, tool

PARALLEL_PROMPT = 1280
"""Cells for llama-parallel's prompt, its own system text: some 280 tokens in a vocabulary of
100,000 or more, 1,160 in the embedded model's."""

_TOTALS = {
    "prompt": re.compile(r"Total prompt tokens:\s*(\d+), speed:"),
    "generated": re.compile(r"Total gen tokens:\s*(\d+), speed:\s*([\d.]+) t/s"),
}


def run_all_in(case: Case) -> Measured:
    """llama-batched-bench, its prompt and decode time together."""
    measured = run_batched_bench(case)
    return replace(measured, t_pp=0.0, t_tg=measured.t_pp + measured.t_tg)


def run_parallel(case: Case) -> Measured:
    """llama-parallel with one request per client.  It times prompts and tokens together, makes its
    prompts itself, and may generate a token more or less: `t_tg` is its time per token, for the
    case's tokens."""
    per_client = -(-(PARALLEL_PROMPT + case.tg) // 256) * 256
    with tempfile.TemporaryDirectory() as folder:
        question = Path(folder, "question.txt")
        question.write_text("Why?", encoding="utf-8")
        command = [
            str(tool("llama-parallel", log=False)), "-m", str(case.model.path), "--offline",
            "-np", str(case.pl), "-ns", str(case.pl), "-n", str(case.tg), "--ignore-eos",
            "-c", str((case.pl + 1) * per_client), "-kvu" if case.kv_unified else "-no-kvu",
            "-b", str(case.n_batch), "-ub", str(case.n_ubatch), "-fit", "off",
            "-t", str(case.n_threads), "-tb", str(case.n_threads), "-f", str(question),
            "--seed", "-1" if case.sampling == "default" else "1",
            "--temp", "0" if case.sampling == "greedy" else "0.8",
        ]  # fmt: skip
        if case.n_gpu_layers >= 0:
            command += ["-ngl", str(case.n_gpu_layers)]
        return parallel_totals(command, case)


def parallel_totals(command: list[str], case: Case) -> Measured:
    """From what the tool prints at its end, which its logger may lose: then it runs again."""
    for _ in range(ATTEMPTS):
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        output = done.stdout + done.stderr
        prompt, generated = (pattern.search(output) for pattern in _TOTALS.values())
        if done.returncode == 0 and prompt and generated and float(generated[2]) > 0:
            detail = {
                "prompt_tokens": int(prompt[1]) / case.pl,
                "generated_tokens": int(generated[1]) / case.pl,
            }
            return Measured(0.0, case.tg * case.pl / float(generated[2]), detail=detail)
        if done.returncode != 0:
            break
    tail = "\n".join(output.strip().splitlines()[-8:])
    raise ToolError(f"llama-parallel gave no result:\n{tail}")
