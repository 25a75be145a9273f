"""Gauges and counters read off the engine's newest snapshot when they are scraped.

The snapshot is replaced as a whole by the event loop, so a scrape reads one and takes no lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from engine.client import Engine
from engine.errors import EngineUnavailableError
from engine.host_memory import resident_bytes
from engine.messages import EngineInfo, Stats
from server.metric_families import Families

_PHASES = "prefill: prompts or replayed output only; decode: new tokens only; mixed: both."
_PAGES = "used: held by sequences; cached: kept for prefixes and given up on demand; free."


class EngineCollector(Collector):
    """All series of one engine. Counters go on over its restarts."""

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
        yield from self._reads(stats)
        yield from self._pools(stats)
        try:
            info = self._engine.info
        except EngineUnavailableError:
            return  # the model is not loaded yet
        yield self._pool_bytes(stats, info)
        yield from self._facts(info)

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

    def _reads(self, stats: Stats) -> Iterator[Metric]:
        """What decode steps read; bytes are computed from shapes and counts (engine.read_bytes)."""
        make = self._make
        yield make.gauges(
            "layer_attended_fraction",
            "Share of the context that the retrieval heads of a layer attended: moving mean over "
            "the decode steps in which they selected.",
            ("layer",),
            {
                (str(layer),): fraction
                for layer, fraction in sorted(stats.layer_attended_fraction.items())
            },
        )
        yield make.counter(
            "decode_attended_tokens",
            "Tokens attended, summed over decode steps and the retrieval heads that selected.",
            stats.attended_tokens,
        )
        yield make.counter(
            "decode_context_tokens",
            "Context lengths, summed over the same steps and heads as "
            "rtpurbo_decode_attended_tokens_total: what dense heads would have attended.",
            stats.context_tokens,
        )
        yield make.counters(
            "kv_bytes_read",
            "Bytes of keys and values that decode steps read, computed from shapes. selected: "
            "retrieval heads that selected, at most (heads of one KV head share what both chose); "
            "whole: retrieval heads that attended all of the context; window: local heads.",
            ("kind",),
            {
                ("selected",): stats.read_selected_bytes,
                ("whole",): stats.read_whole_bytes,
                ("window",): stats.read_window_bytes,
            },
        )
        yield make.counter(
            "index_bytes_read",
            "Bytes of index keys that decode steps read in order to select, computed from shapes: "
            "the cost of selection.",
            stats.read_index_bytes,
        )
        yield make.counter(
            "kv_bytes_read_dense",
            "Bytes of keys and values that the same decode steps would have read with full "
            "attention in every head, computed from shapes.",
            stats.read_dense_bytes,
        )

    def _pools(self, stats: Stats) -> Iterator[Metric]:
        make = self._make
        yield make.gauges(
            "kv_cache_usage_ratio",
            "Share of a KV pool's pages that sequences hold.",
            ("pool",),
            {
                ("full",): stats.full_used / max(stats.full_total, 1),
                ("window",): stats.window_used / max(stats.window_total, 1),
            },
        )
        yield make.gauges(
            "kv_cache_pages",
            f"Pages of a KV pool by state. {_PAGES}",
            ("pool", "state"),
            _pages(stats),
        )
        yield make.gauge(
            "kv_cache_free_tokens",
            "Tokens of context that still fit if cached prefixes are given up: bounded by the full "
            "pool, and by the window pool where it has no room for another window.",
            stats.free_tokens,
        )

    def _pool_bytes(self, stats: Stats, info: EngineInfo) -> Metric:
        page_bytes = {"full": info.full_page_bytes, "window": info.window_page_bytes}
        return self._make.gauges(
            "kv_cache_bytes",
            f"Bytes of a KV pool by state. {_PAGES}",
            ("pool", "state"),
            {
                (pool, state): count * page_bytes[pool]
                for (pool, state), count in _pages(stats).items()
            },
        )

    def _facts(self, info: EngineInfo) -> Iterator[Metric]:
        make = self._make
        facts = {
            "version": version("rtpurbo"),
            "attention": info.attention,
            "device": info.device,
            "dtype": info.dtype,
            "kernels": info.kernels,
        }
        yield make.info("build", "What is served, and by what.", facts)
        yield make.gauges(
            "kv_bytes_per_token",
            "KV bytes of one more token of context, as it is served and if it were dense.",
            ("cache",),
            {("sparse",): info.kv_bytes_per_token, ("dense",): info.kv_bytes_per_token_dense},
        )
        for name, text, value in (
            ("retrieval_heads", "Query heads with full context.", info.retrieval_heads),
            ("attention_heads", "Query heads of the model.", info.attention_heads),
            ("max_model_len", "Longest prompt and output together, tokens.", info.max_model_len),
            ("max_sequences", "Most sequences computed together.", info.max_num_seqs),
            ("block_tokens", "Tokens of a KV page.", info.block_tokens),
            ("window_tokens", "Window of local heads, tokens; 0: none.", info.window_tokens),
        ):
            yield make.gauge(name, text, value)


def _pages(stats: Stats) -> dict[tuple[str, ...], float]:
    """Pages by pool and state; the three states of a pool are all of it."""
    pools = {
        "full": (stats.full_used, stats.full_cached, stats.full_total),
        "window": (stats.window_used, stats.window_cached, stats.window_total),
    }
    return {
        (pool, state): count
        for pool, (used, cached, total) in pools.items()
        for state, count in (("used", used), ("cached", cached), ("free", total - used - cached))
    }
