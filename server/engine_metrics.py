"""What the engine does, read off its newest snapshot when it is scraped: health, load, work.

What it holds and reads is in `server.cache_metrics`. The event loop replaces the snapshot as a
whole, so a scrape takes one and no lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from engine.client import Engine
from engine.host_memory import resident_bytes
from engine.messages import Stats
from server.metric_families import Families

_PHASES = "prefill: prompts or replayed output only; decode: new tokens only; mixed: both."


class EngineCollector(Collector):
    """Series of one engine. Counters go on over its restarts."""

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        dropped_lines: Callable[[], int] = int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            dropped_lines: log lines that the front end lost.
            clock: the engine's, in monotonic seconds.
        """
        self._dropped_lines = dropped_lines
        self._engine = engine
        self._make = Families(model_name)
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield from self._health()
        yield self._log(stats)
        yield from self._load(stats)
        yield from self._work(stats)

    def _health(self) -> Iterator[Metric]:
        make, engine = self._make, self._engine
        yield make.gauge("engine_up", "1 while the engine takes work.", engine.state == "ready")
        yield make.gauge(
            "seconds_since_engine_step",
            "Age of the engine loop's last sign of life, seconds; an idle loop gives one as well.",
            engine.seconds_since_step(),
        )
        yield make.gauge(
            "engine_resident_bytes",
            "Physical memory of the engine process, 0 while there is none; of the front end it is "
            "process_resident_memory_bytes.",
            0 if engine.pid is None else resident_bytes(engine.pid),
        )
        recovery = engine.recovery
        yield make.counter("engine_restarts", "Engine processes started again.", engine.restarts)
        yield make.counter(
            "requests_resumed",
            "Requests that went on in another engine process, one for each time.",
            recovery.resumed,
        )
        yield make.counter(
            "requests_poisoned",
            "Requests that failed because they alone ended the engine.",
            recovery.poisoned,
        )
        yield make.gauge(
            "engine_features_off",
            "Fast paths that the engine does without since requests ended engines with them: "
            "1 CUDA graphs, 2 attention kernels too.",
            recovery.features_off,
        )
        yield make.summary(
            "engine_outage_seconds",
            "From the loss of an engine to the first report of the next one, of outages that are "
            "over: how long clients saw a pause.",
            recovery.outages,
            recovery.outage_seconds,
        )

    def _log(self, stats: Stats) -> Metric:
        return self._make.counters(
            "log_lines_dropped",
            "Log lines lost by a process because their reader was too slow or had gone.",
            ("process",),
            {("front_end",): self._dropped_lines(), ("engine",): stats.log_lines_dropped},
        )

    def _load(self, stats: Stats) -> Iterator[Metric]:
        make, now = self._make, self._clock()
        arrivals = {("waiting",): stats.oldest_waiting, ("running",): stats.oldest_running}
        yield make.gauge("requests_running", "Sequences being computed.", stats.running)
        yield make.gauge(
            "requests_waiting", "Sequences that wait for a slot or for pages.", stats.waiting
        )
        yield make.gauge(
            "requests_prefilling",
            "Running sequences whose prompt is being computed.",
            stats.prefilling,
        )
        yield make.gauges(
            "oldest_request_age_seconds",
            "Age of the sequence that was admitted first among those that wait, or that run; "
            "0: there is none.",
            ("state",),
            {
                state: 0.0 if arrival is None else max(now - arrival, 0.0)
                for state, arrival in arrivals.items()
            },
        )
        yield make.gauge(
            "prefill_tokens_remaining",
            "Prompt tokens still to compute, of running and waiting sequences.",
            stats.prefill_remaining,
        )
        total = stats.oldest_prefill_total
        yield make.gauge(
            "prefill_progress_ratio",
            "Computed share of the prompt that has been under way for longest; 1: none is.",
            stats.oldest_prefill_done / total if total else 1.0,
        )

    def _work(self, stats: Stats) -> Iterator[Metric]:
        make = self._make
        yield make.counter("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
        yield make.counter("generated_tokens", "Tokens generated.", stats.generated_tokens)
        yield make.counter(
            "prefix_cache_hit_tokens",
            "Prompt tokens taken from the prefix cache instead of computed.",
            stats.prefix_hit_tokens,
        )
        yield make.counter(
            "preemptions",
            "Sequences that lost their pages to others and were computed again.",
            stats.preemptions,
        )
        yield make.counters(
            "engine_steps",
            f"Engine steps by what they computed. {_PHASES}",
            ("phase",),
            {
                ("prefill",): stats.prefill_steps,
                ("decode",): stats.decode_steps,
                ("mixed",): stats.mixed_steps,
            },
        )
        yield make.counters(
            "engine_step_seconds",
            f"Seconds spent in engine steps by what they computed. {_PHASES}",
            ("phase",),
            {
                ("prefill",): stats.prefill_seconds,
                ("decode",): stats.decode_seconds,
                ("mixed",): stats.mixed_seconds,
            },
        )
