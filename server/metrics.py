"""What Prometheus sees (design section 8): fed by finished requests and engine snapshots.

A registry of its own per server, no default one; labels are our words, never a client's.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.client import Engine
from engine.errors import EngineUnavailableError
from engine.messages import Attended, Stats, Timing

LONG_SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300),
    *(600, 1200, 1800),
)
STEP_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.5, 1, 2, 5, 10, 30),
)
TOKENS = (*(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5)), 1e6)
FRACTIONS = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
)
CACHE_SECONDS = 1.0  # scrapes closer together share one rendering


class ServerMetrics:
    """All series of one server."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self.queue_seconds = self._seconds("request_queue", "From arrival to the first computation")
        self.prefill_seconds = self._seconds(
            "request_prefill", "From first computation to first token"
        )
        self.decode_seconds = self._seconds("request_decode", "From first to last token")
        self.first_token_seconds = self._seconds(
            "time_to_first_token", "From arrival to first token"
        )
        self.duration_seconds = self._seconds("request_duration", "From arrival to the end")
        self.inter_token_seconds = self._histogram(
            "inter_token_latency_seconds", "Time between two tokens of a request", STEP_SECONDS
        )
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Prompt length", TOKENS)
        self.generated_tokens = self._histogram(
            "request_generated_tokens", "Generated tokens of a request", TOKENS
        )
        self.attended_tokens = self._histogram(
            "attended_tokens",
            "Tokens attended per retrieval head and decode step, mean of a request",
            TOKENS,
        )
        self.attended_fraction = self._histogram(
            "attended_fraction",
            "Attended share of the context per retrieval head and decode step, mean of a request",
            FRACTIONS,
        )
        self.finished = self._counter(
            "requests_finished", "Requests that ended, by reason", "reason"
        )
        self.rejected = self._counter("requests_rejected", "Requests refused, by code", "reason")
        self.unknown_fields = self._counter(
            "request_unknown_fields", "Request fields that are not known and were ignored"
        )
        self.registry.register(EngineCollector(engine, model_name))

    def observe_request(
        self,
        *,
        prompt_tokens: int,
        generated_tokens: int,
        reason: str,
        duration: float,
        timing: Timing | None,
        attended: Attended | None,
    ) -> None:
        """Account one engine request that ended for any reason; `duration` in seconds."""
        self.finished.labels(self._model, reason).inc()
        self.prompt_tokens.labels(self._model).observe(prompt_tokens)
        self.generated_tokens.labels(self._model).observe(generated_tokens)
        self.duration_seconds.labels(self._model).observe(duration)
        if timing is not None:
            self._observe_timing(timing)
        if attended is not None and attended.pairs:
            self.attended_tokens.labels(self._model).observe(attended.tokens / attended.pairs)
            self.attended_fraction.labels(self._model).observe(attended.fraction / attended.pairs)

    def observe_tokens(self, seconds: float, tokens: int) -> None:
        """Account `tokens` that arrived `seconds` after the ones before them."""
        histogram = self.inter_token_seconds.labels(self._model)
        for _ in range(tokens):
            histogram.observe(seconds / tokens)

    def count_rejected(self, reason: str) -> None:
        """`reason` is an error code of ours, of which there are few."""
        self.rejected.labels(self._model, reason).inc()

    def count_unknown_fields(self, count: int) -> None:
        self.unknown_fields.labels(self._model).inc(count)

    def _observe_timing(self, timing: Timing) -> None:
        if timing.queue is not None:
            self.queue_seconds.labels(self._model).observe(timing.queue)
        if timing.prefill is not None:
            self.prefill_seconds.labels(self._model).observe(timing.prefill)
        if timing.decode is not None:
            self.decode_seconds.labels(self._model).observe(timing.decode)
        if timing.queue is not None and timing.prefill is not None and timing.decode is not None:
            self.first_token_seconds.labels(self._model).observe(timing.queue + timing.prefill)

    def _seconds(self, name: str, text: str) -> Histogram:
        return self._histogram(f"{name}_seconds", f"{text}, seconds", LONG_SECONDS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"rtpurbo_{name}", text, ["model_name"], buckets=buckets, registry=self.registry
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"rtpurbo_{name}", text, ["model_name", *labels], registry=self.registry)


class EngineCollector(Collector):
    """Gauges and counters read off the engine's newest snapshot when they are scraped."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._model = model_name

    def collect(self) -> Iterator[Metric]:
        engine, stats = self._engine, self._engine.stats
        yield self._gauge("engine_up", "1 while the engine takes work", engine.state == "ready")
        yield self._gauge(
            "seconds_since_engine_step",
            "Age of the engine loop's last sign of life, seconds",
            engine.seconds_since_step(),
        )
        yield self._counter("engine_restarts", "Engine processes started again", engine.restarts)
        yield self._counter("requests_resumed", "Requests carried over an engine restart", 0)
        yield from self._load(stats)
        yield from self._pools(stats)
        layers = self._family("layer_attended_fraction", "Attended share of the context", "layer")
        for layer, fraction in sorted(stats.layer_attended_fraction.items()):
            layers.add_metric([self._model, str(layer)], fraction)
        yield layers
        yield from self._constants()

    def _load(self, stats: Stats) -> Iterator[Metric]:
        yield self._gauge("requests_running", "Sequences being computed", stats.running)
        yield self._gauge("requests_waiting", "Sequences that wait for a slot", stats.waiting)
        yield self._gauge(
            "prefill_tokens_remaining", "Prompt tokens still to compute", stats.prefill_remaining
        )
        yield self._counter("prompt_tokens", "Prompt tokens computed", stats.prompt_tokens)
        yield self._counter("generated_tokens", "Tokens generated", stats.generated_tokens)
        yield self._counter(
            "prefix_cache_hit_tokens",
            "Prompt tokens from the prefix cache",
            stats.prefix_hit_tokens,
        )
        yield self._counter("preemptions", "Sequences that lost their pages", stats.preemptions)

    def _pools(self, stats: Stats) -> Iterator[Metric]:
        usage = self._family("kv_cache_usage_ratio", "Used share of a pool's pages", "pool")
        pools = {
            "full": (stats.full_used, stats.full_total),
            "window": (stats.window_used, stats.window_total),
        }
        for pool, (used, total) in pools.items():
            usage.add_metric([self._model, pool], used / total if total else 0.0)
        yield usage

    def _constants(self) -> Iterator[Metric]:
        try:
            info = self._engine.info
        except EngineUnavailableError:
            return
        size = self._family("kv_bytes_per_token", "KV bytes of one more token of context", "cache")
        size.add_metric([self._model, "sparse"], info.kv_bytes_per_token)
        size.add_metric([self._model, "dense"], info.kv_bytes_per_token_dense)
        yield size
        yield self._gauge("retrieval_heads", "Query heads with full context", info.retrieval_heads)
        yield self._gauge("attention_heads", "Query heads of the model", info.attention_heads)

    def _family(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"rtpurbo_{name}", text, labels=["model_name", *labels])

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = self._family(name, text)
        family.add_metric([self._model], float(value))
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"rtpurbo_{name}", text, labels=["model_name"])
        family.add_metric([self._model], float(value))
        return family


class MetricsPage:
    """Renders the registry off the event loop, one rendering at a time and at most one a second."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._page = b""
        self._made = -CACHE_SECONDS

    async def render(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return await asyncio.to_thread(self._render)

    def _render(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._made >= CACHE_SECONDS:
                self._page = generate_latest(self._registry)
                self._made = time.monotonic()
            return self._page
