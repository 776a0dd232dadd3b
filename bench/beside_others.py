"""A profile of a device as an engine has it that shares its cores with others like it."""

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.cache import REPOSITORY
from bench.chats import drawn
from bench.tools import ToolError
from pyllamabatch.cost.calibrate import calibrate
from pyllamabatch.cost.profile import Profile, file_name, profile_folder
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SamplingParams

N_PROMPT, N_ANSWER = 100, 16  # tokens of what the others compute


def calibrated(
    model: Model, gpu_layers: int, seconds: float, n_others: int, **engine: Any
) -> Profile:
    """Measured while `n_others` processes compute with an engine each, of the same model and with
    these options of `Engine`, and saved where engines of this machine look for it. ToolError where
    one of them ends."""
    print(f"measuring the device for {seconds:g} s", file=sys.stderr)
    others = [keeping_busy(model.path, gpu_layers, engine) for _ in range(n_others)]
    try:
        for one in others:
            assert one.stdout is not None
            if not one.stdout.readline():
                raise ToolError("a process that should keep a core busy has ended")
        threads = {name: engine[name] for name in ("n_threads", "n_threads_batch")}
        profile = calibrate(
            model, budget=seconds, layouts=("unified",), beside=[o.pid for o in others],
            n_seq_max=engine["n_seq_max"] + 1, **threads,
        )  # fmt: skip
        if any(one.poll() is not None for one in others):
            raise ToolError("a process that should keep a core busy has ended meanwhile")
    finally:
        for one in others:
            one.kill()
            one.communicate()
    profile.save(profile_folder() / file_name(profile.key))
    return profile


@contextmanager
def own_profiles() -> Iterator[None]:
    """Profiles are saved where this process and those that it starts alone look for them."""
    name = "PYLLAMABATCH_CACHE"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


def keeping_busy(path: str, gpu_layers: int, engine: dict[str, Any]) -> subprocess.Popen[str]:
    """A process that computes as an engine does. It writes a line when it begins."""
    words = f"{path!r}, {gpu_layers}, {os.getpid()}, **{engine!r}"
    call = f"from bench.beside_others import keep_busy; keep_busy({words})"
    return subprocess.Popen([sys.executable, "-c", call], cwd=REPOSITORY, stdout=subprocess.PIPE,
                            text=True)  # fmt: skip


def keep_busy(path: str, gpu_layers: int, parent: int, **options: Any) -> None:
    """While `parent` lives, the process that started this one."""
    rng, params = random.Random(1), SamplingParams(max_tokens=N_ANSWER, ignore_eog=True)
    with Model(path, n_gpu_layers=gpu_layers) as model, Engine(model, **options) as engine:
        print("begins", flush=True)
        while os.getppid() == parent:
            engine.generate([drawn(rng, N_PROMPT) for _ in range(engine.limits.n_seq_max)], params)
