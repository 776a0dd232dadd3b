"""Counters and histograms of a server, by the names that dashboards and routers read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from ..engine.results import Result
from ..engine.stats import EngineStats

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from ..engine.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
TOKENS = tuple(2**i for i in range(13))


class BucketHistogram:
    """Counts by upper bound. For one thread."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, n: int = 1) -> None:
        """`n` times the same value."""
        self.counts[bisect_left(self.bounds, value)] += n
        self.total += value * n

    def median(self) -> float | None:
        """The upper bound of the bucket that it lies in; None without values."""
        n, wanted = 0, sum(self.counts) / 2
        for bound, count in zip(self.bounds, self.counts, strict=False):
            n += count
            if n and n >= wanted:
                return bound
        return self.bounds[-1] if sum(self.counts) else None

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        buckets, n = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            n += count
            buckets.append((bound, n))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self.total)


class Metrics(Collector):
    """Written by the event loop, read by `/metrics`. `engine`: its counters are read then."""

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine
        self.ttft = BucketHistogram(SECONDS)
        self.itl = BucketHistogram(SHORT_SECONDS)
        self.e2el = BucketHistogram(SECONDS)
        self.queue = BucketHistogram(SECONDS)
        self.n_prompt = 0  # tokens of prompts that were computed
        self.n_cached = 0
        self.prompt_s = 0.0
        self.n_generated = 0
        self.generation_s = 0.0
        self._n_longest = 0  # tokens of a sequence
        self._last: tuple[float, EngineStats] | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def ended(self, result: Result) -> None:
        """A request has."""
        self.e2el.add(result.e2el_s)
        if result.queue_s is not None:
            self.queue.add(result.queue_s)
        if result.ttft_s is not None:
            self.ttft.add(result.ttft_s)
            self.n_prompt += result.n_prompt - result.n_cached
            self.n_cached += result.n_cached
            self.prompt_s += result.ttft_s - (result.queue_s or 0.0)
            self.generation_s += result.e2el_s - result.ttft_s
        self.n_generated += result.n_generated
        self._n_longest = max(self._n_longest, result.n_prompt + result.n_generated)

    def ended_whole(self, result: Result) -> None:
        """One has that was not read before its end: its tokens came one like the other."""
        self.ended(result)
        n = result.n_generated - 1
        if result.ttft_s is not None and n > 0:
            self.itl.add((result.e2el_s - result.ttft_s) / n, n)

    def itl_ms(self) -> float | None:
        """The median of all inter-token latencies, by the bounds of the histogram."""
        median = self.itl.median()
        return None if median is None else 1e3 * median

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry) + self._longest()

    def _longest(self) -> bytes:
        """llama-server's counter whose name has not the end that the library gives each."""
        if self._engine is None:
            return b""
        running = [slot.n_prompt + slot.generated for slot in self._engine.slots()]
        self._n_longest = n = max(self._n_longest, *running)
        name = "llamacpp:n_tokens_max"
        help = f"# HELP {name} Tokens of the longest sequence so far.\n# TYPE {name} counter\n"
        return f"{help}{name} {n}\n".encode()

    def collect(self) -> Iterator[Metric]:
        if self._engine is None:
            return
        stats = self._engine.stats()
        yield from self._gauges(stats)
        yield from self._counters(stats)
        yield self.ttft.family("vllm:time_to_first_token_seconds", "Submission to first token.")
        yield self.itl.family("vllm:inter_token_latency_seconds", "Between tokens of a stream.")
        yield self.e2el.family("vllm:e2e_request_latency_seconds", "Submission to the end.")
        yield self.queue.family("vllm:request_queue_time_seconds", "Submission to a slot.")
        tokens = BucketHistogram(TOKENS)
        for n_tokens, n_steps in stats.step_tokens.items():
            tokens.add(n_tokens, n_steps)
        text = "Tokens of a step: rows of prompts, and sampled ones."
        yield tokens.family("vllm:iteration_tokens_total", text)

    def _gauges(self, stats: EngineStats) -> Iterable[Metric]:
        now, (then, before) = perf_counter(), self._last or (0.0, stats)
        seconds = now - then
        self._last = now, stats
        rates = {
            "prompt": (stats.prefill_rows - before.prefill_rows) / seconds,
            "predicted": (stats.tokens - before.tokens) / seconds,
        }
        used = (stats.kv_used + stats.kv_cached) / max(1, stats.kv_total)
        values = (
            ("vllm:num_requests_running", "Requests in a slot.", stats.running),
            ("vllm:num_requests_waiting", "Requests that wait for one.", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV cells that running requests hold, 0 to 1.",
             stats.kv_used / max(1, stats.kv_total)),
            ("llamacpp:requests_processing", "Requests in a slot.", stats.running),
            ("llamacpp:requests_deferred", "Requests that wait for one.", stats.waiting),
            ("llamacpp:kv_cache_usage_ratio", "Share of KV cells in use, cached ones too.", used),
            ("llamacpp:kv_cache_tokens", "KV cells in use.", stats.kv_used + stats.kv_cached),
            ("llamacpp:prompt_tokens_seconds", "Prompt rows a second since the last look.",
             rates["prompt"]),
            ("llamacpp:predicted_tokens_seconds", "Tokens a second since the last look.",
             rates["predicted"]),
            ("llamacpp:n_busy_slots_per_decode", "Slots with rows in a step, on average.",
             stats.slot_steps / max(1, stats.steps)),
        )  # fmt: skip
        return [GaugeMetricFamily(name, text, value=value) for name, text, value in values]

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        values = (
            ("llamacpp:prompt_tokens", "Prompt tokens computed.", self.n_prompt),
            ("llamacpp:prompt_tokens_cached", "Prompt tokens in the cache.", self.n_cached),
            ("llamacpp:prompt_seconds", "Slot to first token.", self.prompt_s),
            ("llamacpp:tokens_predicted", "Tokens of requests that ended.", self.n_generated),
            ("llamacpp:tokens_predicted_seconds", "First token to the end.", self.generation_s),
            ("llamacpp:n_decode", "Steps.", stats.steps),
            ("vllm:prompt_tokens", "Prompt tokens computed.", self.n_prompt),
            ("vllm:generation_tokens", "Tokens sampled.", stats.tokens),
            ("vllm:num_preemptions", "Requests that gave up their cells.", stats.preemptions),
            ("vllm:prefix_cache_queries", "Tokens of admitted sequences.", stats.known_tokens),
            ("vllm:prefix_cache_hits", "Of these, in the cache.", stats.prefix_tokens),
        )
        for name, text, value in values:
            yield CounterMetricFamily(name, text, value=value)
        yield from _drafts("vllm", stats)
        yield from _drafts("llamacpp", stats)
        ended = CounterMetricFamily("vllm:request_success", "Ended.", labels=["finished_reason"])
        for reason, n in stats.finished.items():
            ended.add_metric([reason], n)
        yield ended


def _drafts(server: str, stats: EngineStats) -> Iterator[Metric]:
    """By names that two servers have in common."""
    values = (
        ("drafts", "Drafts checked.", stats.drafts),
        ("draft_tokens", "Drafted tokens checked.", stats.drafted_tokens),
        ("accepted_tokens", "Of these, right.", stats.accepted_tokens),
    )
    for name, text, value in values:
        yield CounterMetricFamily(f"{server}:spec_decode_num_{name}", text, value=value)
    name, text = "spec_decode_num_accepted_tokens_per_pos", "Right, by place in the draft."
    right = CounterMetricFamily(f"{server}:{name}", text, labels=["position"])
    for position, n in enumerate(stats.accepted_at):
        right.add_metric([str(position)], n)
    yield right
