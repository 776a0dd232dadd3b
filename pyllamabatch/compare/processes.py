"""The arm of N processes: workers behind a router, and their clients in this process."""

from __future__ import annotations

import http.client
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyllamabatch.compare.arms import START_S, ArmError, answer
from pyllamabatch.compare.case import Case
from pyllamabatch.compare.child import Child
from pyllamabatch.compare.clients import at_once, sleep_until
from pyllamabatch.compare.job import BURST, Job, Outcome, Served
from pyllamabatch.compare.worker import HOST
from pyllamabatch.errors import PyllamabatchError

GONE_S = 0.2  # a worker whose connections have ended may need so long to end, too


class Processes:
    """A worker per sequence (`worker.py`) and a router (`router.py`)."""

    def __init__(self, case: Case, sampler: str, memory_limit: int, verbose: bool) -> None:
        """`case`: with the threads of one worker; memory_limit: of each, in bytes; 0: none."""
        self._case = case
        self._setup: dict[str, Any] = {
            "sampler": sampler,
            "case": replace(case, pl=1).to_json(),
            "memory_limit": memory_limit,
            "verbose": verbose,
        }
        self._stack = ExitStack()
        try:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            self._workers = [self._child("worker", verbose) for _ in range(case.pl)]
            self._router = self._child("router", verbose)
        except BaseException:
            self._stack.close()
            raise
        self.pids = [child.pid for child in (*self._workers, self._router)]
        self.port = 0  # the router's
        self._n_vocab = 0

    def _child(self, module: str, verbose: bool) -> Child:
        child = Child(f"pyllamabatch.compare.{module}", loud=verbose)
        return self._stack.enter_context(child)

    def load(self) -> None:
        for i, worker in enumerate(self._workers):
            folder = self._folder / f"worker-{i}"
            folder.mkdir()
            worker.tell(json.dumps(self._setup | {"kv_folder": str(folder)}))
        ports = []
        for i, worker in enumerate(self._workers):
            try:
                ready = answer(worker, START_S)
            except PyllamabatchError as error:
                raise ArmError(f"{error}\n{self._not_started(i)}") from None
            ports.append(ready["port"])
            self._n_vocab = ready["n_vocab"]
        self._router.tell(json.dumps({"ports": ports}))
        self.port = answer(self._router, START_S)["port"]

    def _not_started(self, i: int) -> str:
        words = f"worker {i} of {len(self._workers)} did not start"
        if limit := self._setup["memory_limit"]:
            words += f" with {limit / 2**20:.0f} MiB of heap and anonymous memory at most"
        return words

    def run(self, job: Job, limit_s: float) -> Outcome:
        """In a burst every worker gets two requests: one for the prompt and the first token, and
        when all have that, one to go on. The router's turns bring each to every worker once."""
        case, n = self._case, len(job.arrivals)
        prompts = job.prompts(case, self._n_vocab).tolist()
        served = [Served() for _ in range(n)]

        def begin(i: int, began: float) -> None:
            served[i].arrived = began + job.arrivals[i]
            sleep_until(served[i].arrived)
            n_first = 1 if job.protocol == BURST else job.tokens
            body = {"prompt": prompts[i], "n_predict": n_first, "seed": case.seed + i}
            self._ask(body | {"keep": job.protocol == BURST}, served[i], limit_s)

        def go_on(i: int, began: float) -> None:
            self._ask({"prompt": [], "n_predict": job.tokens - 1}, served[i], limit_s)

        began, _ = at_once(n, begin, self.close)
        if job.protocol == BURST and not any(one.error for one in served):
            began, _ = at_once(n, go_on, self.close)
        lost = [one for one in served if one.error]
        ended = [w.how_it_ended() for w in self._workers if w.ended(GONE_S)] if lost else []
        for one in lost:
            one.error = "; ".join([one.error, *ended])
        return Outcome(began, served)

    def _ask(self, body: dict[str, Any], one: Served, limit_s: float) -> None:
        try:
            for line in completion(self.port, body, limit_s):
                if "token" in line:
                    one.times.append(time.perf_counter())
        except ArmError as error:
            one.error = str(error)

    def close(self) -> None:
        self._stack.close()


def completion(port: int, body: dict[str, Any], limit_s: float) -> Iterator[dict[str, Any]]:
    """The lines of a router's (or a worker's) answer as they come, the last one has "done".
    ArmError for anything else, and after `limit_s`."""
    end = time.monotonic() + limit_s
    connection = http.client.HTTPConnection(HOST, port, timeout=limit_s)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/completion", json.dumps(body).encode(), headers)
        for text in connection.getresponse():
            line: dict[str, Any] = json.loads(text)
            if "error" in line:
                raise ArmError(line["error"])
            yield line
            if "done" in line:
                return
            if time.monotonic() > end:
                raise ArmError(f"not done after {limit_s:g} s")
        raise ArmError("the answer ended early")
    except (OSError, http.client.HTTPException) as error:
        raise ArmError(f"{type(error).__name__}: {error}") from None
    finally:
        connection.close()
