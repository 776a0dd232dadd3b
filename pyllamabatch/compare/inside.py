"""The arms that are one process: a raw loop on one context, a loop on each of N, and the engine."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

from pyllamabatch.compare.case import I32, Case
from pyllamabatch.compare.job import BURST, Job, Outcome, Served
from pyllamabatch.compare.loop import Loop, loop_of
from pyllamabatch.errors import PyllamabatchError
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model


class Inside(ABC):
    """An arm on a model that is loaded; `case.n_threads`: of each of its contexts."""

    def __init__(self, model: Model, case: Case) -> None:
        self.model = model
        self.case = case

    @abstractmethod
    def run(self, job: Job) -> Outcome: ...

    @abstractmethod
    def close(self) -> None: ...


class Todo:
    """Requests in the order of their arrival, for any number of threads."""

    def __init__(self, job: Job, prompts: I32, seed: int) -> None:
        self.job = job
        self.served = [Served() for _ in job.arrivals]
        self._prompts = prompts
        self._seed = seed
        self._left = deque(enumerate(job.arrivals))
        self._lock = threading.Lock()
        self.began = time.perf_counter()

    def start_one(self, loop: Loop, seq: int) -> Served | None:
        """The next one that has come, as `seq` of the loop."""
        with self._lock:
            if not self._left or self.began + self._left[0][1] > time.perf_counter():
                return None
            i, arrival = self._left.popleft()
        self.served[i].arrived = self.began + arrival
        loop.start(seq, self._prompts[i].tolist(), self._seed + i)
        return self.served[i]

    def wait(self) -> bool:
        """Until the next one comes; whether there is one."""
        with self._lock:
            if not self._left:
                return False
            moment = self.began + self._left[0][1]
        time.sleep(max(0.0, moment - time.perf_counter()))
        return True


def drive(loop: Loop, n_slots: int, todo: Todo, all_ready: Callable[[], object]) -> None:
    """Serve what is to do in `n_slots` sequences of one loop. In a burst `all_ready()` is called
    when all have their first token, before anybody goes on. A decode that fails ends this loop;
    its requests say why."""
    free = deque(range(n_slots))
    at: dict[int, Served] = {}
    held = todo.job.protocol == BURST
    try:
        while True:
            while free and (one := todo.start_one(loop, free[0])):
                at[free.popleft()] = one
            if loop.idle:
                if not todo.wait():
                    return
                continue
            if held and not loop.prefilling:
                all_ready()
                held = False
            sampled = loop.step(decode=not held)
            now = time.perf_counter()
            for seq in sampled:
                at[seq].times.append(now)
                if len(at[seq].times) == todo.job.tokens:
                    del at[seq]
                    loop.stop(seq)
                    free.append(seq)
    except (PyllamabatchError, threading.BrokenBarrierError) as error:
        for seq, one in at.items():
            one.error = str(error) or "another context failed before the time started"
            loop.stop(seq)
        if held:
            raise


class Shared(Inside):
    """One context for all sequences, one batch per step."""

    def __init__(self, model: Model, case: Case, sampler: str) -> None:
        super().__init__(model, case)
        self._stack = ExitStack()
        context = self._stack.enter_context(Context(model, **case.context_params()))
        self._loop = loop_of(sampler, context, case.sampling)
        self._stack.callback(self._loop.close)

    def run(self, job: Job) -> Outcome:
        todo = Todo(job, job.prompts(self.case, self.model.n_vocab), self.case.seed)
        begin = [todo.began]

        def all_ready() -> None:
            begin[0] = time.perf_counter()

        drive(self._loop, self.case.pl, todo, all_ready)
        return Outcome(begin[0], todo.served)

    def close(self) -> None:
        self._stack.close()


class Contexts(Inside):
    """A context and a thread for each sequence."""

    def __init__(self, model: Model, case: Case, sampler: str) -> None:
        super().__init__(model, case)
        self._stack = ExitStack()
        self._threads = self._stack.enter_context(ThreadPoolExecutor(case.pl))
        one = replace(case, pl=1)
        self._loops: list[Loop] = []
        try:
            for _ in range(case.pl):
                context = self._stack.enter_context(Context(model, **one.context_params()))
                loop = loop_of(sampler, context, case.sampling, case.n_threads)
                self._stack.callback(loop.close)
                self._loops.append(loop)
        except BaseException:
            self._stack.close()
            raise

    def run(self, job: Job) -> Outcome:
        n = self.case.pl
        begin = [0.0]

        def stamp() -> None:
            begin[0] = time.perf_counter()

        ready = threading.Barrier(n, action=stamp)
        todo = Todo(job, job.prompts(self.case, self.model.n_vocab), self.case.seed)
        if job.protocol != BURST:
            begin[0] = todo.began

        def thread(loop: Loop) -> None:
            try:
                drive(loop, 1, todo, ready.wait)
            except BaseException:
                ready.abort()
                raise

        done = [self._threads.submit(thread, loop) for loop in self._loops]
        errors = [future.exception() for future in done]
        for error in errors:
            if error is not None and not isinstance(error, threading.BrokenBarrierError):
                raise error
        return Outcome(begin[0], todo.served)

    def close(self) -> None:
        self._stack.close()
