"""GpuQueue: reservations, whose times are exact; and sleeping, which never ends early."""

import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

from pyllamabatch.machine.gpu_queue import GpuQueue, sleep_until

HOUR_NS = 3600 * 10**9


def test_steps_of_threads_follow_each_other(tmp_path: Path) -> None:
    queue, found = GpuQueue("gpu", tmp_path), []

    def work() -> None:
        for _ in range(200):
            found.append(queue.reserve(0.01, 0))  # noqa: PERF401 (in turns)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.sort()
    assert [end - start for start, end in found] == [10**7] * 800
    assert all(end == start for (_, end), (start, _) in pairwise(found))
    queue.close()
    queue.close()


def test_processes_share_it_by_its_name(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from pyllamabatch.machine.gpu_queue import GpuQueue\n"
        "queue = GpuQueue('gpu', pathlib.Path(sys.argv[1]))\n"
        "print(max(queue.reserve(1.0, 0)[1] for _ in range(50)))"
    )
    queue, other = GpuQueue("gpu", tmp_path), GpuQueue("other", tmp_path)
    first, _ = queue.reserve(1.0, time.perf_counter_ns())
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    ends = [int(child.communicate(timeout=60)[0]) for child in children]
    assert max(ends) == first + 101 * 10**9
    assert queue.reserve(1.0, 0)[0] == max(ends)
    now = time.perf_counter_ns()
    assert other.reserve(1.0, now)[0] == now
    queue.close()
    other.close()


def test_a_step_that_was_ready_earlier_begins_where_the_gpu_was_free(tmp_path: Path) -> None:
    queue = GpuQueue("gpu", tmp_path)
    now = time.perf_counter_ns()
    _, end = queue.reserve(0.001, now)
    assert queue.reserve(0.001, now)[0] == end
    later = end + HOUR_NS
    assert queue.reserve(0.001, later)[0] == later
    queue.close()


def test_what_another_boot_has_left_counts_for_nothing(tmp_path: Path) -> None:
    queue = GpuQueue("gpu", tmp_path)
    now = time.perf_counter_ns()
    before = now + HOUR_NS, now - 10**10, time.time_ns()  # its clock was ten seconds behind
    (tmp_path / "gpu.gpu").write_bytes(b"".join(n.to_bytes(8, sys.byteorder) for n in before))
    assert queue.reserve(0.001, now)[0] == now
    queue.close()


def test_sleeping_ends_at_the_time_and_leaves_the_core_to_others() -> None:
    for seconds in (0.0, 1e-4, 0.003, 0.02):
        cpu, end = time.thread_time(), time.perf_counter_ns() + int(seconds * 1e9)
        sleep_until(end)
        assert time.perf_counter_ns() >= end
    assert time.thread_time() - cpu < 0.01  # of the last 20 ms
