"""What the engine holds and reads of the KV cache, and what it serves, read off when it is scraped.

As in `server.engine_metrics`, a scrape takes the newest snapshot and no lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from engine.client import Engine
from engine.errors import EngineUnavailableError
from engine.messages import EngineInfo, Stats
from server.metric_families import Families

_PAGES = "used: held by sequences; cached: kept for prefixes and given up on demand; free."


class CacheCollector(Collector):
    """Series of one engine's cache and model; what needs the model's facts is absent until then."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._make = Families(model_name)
        self._version = version("rtpurbo")  # looked up on disk

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield from self._reads(stats)
        yield from self._pools(stats)
        try:
            info = self._engine.info
        except EngineUnavailableError:
            return  # the model is not loaded yet
        yield self._pool_bytes(stats, info)
        yield from self._facts(info)

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
            "version": self._version,
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
