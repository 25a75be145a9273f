"""The engine's newest snapshot, with counters that go on over the processes that made them."""

from __future__ import annotations

import msgspec

from engine.messages import Stats

_COUNTERS = (
    *("step", "preemptions", "prefix_hit_tokens", "prompt_tokens", "generated_tokens"),
    *("decode_steps", "decode_seconds", "prefill_steps", "prefill_seconds"),
    *("mixed_steps", "mixed_seconds", "memory_retries", "attended_tokens", "context_tokens"),
    *("read_selected_bytes", "read_whole_bytes", "read_window_bytes"),
    *("read_index_bytes", "read_dense_bytes", "log_lines_dropped"),
)


class StatsTotal:
    """No counter ever falls, while gauges are those of the process that runs."""

    def __init__(self) -> None:
        self.newest = Stats()
        self._before = Stats()  # of the processes that ended

    def take(self, stats: Stats) -> None:
        """A report of the process that runs."""
        totals = {name: getattr(stats, name) + getattr(self._before, name) for name in _COUNTERS}
        self.newest = msgspec.structs.replace(stats, **totals)

    def lose_engine(self) -> None:
        """The process ended, and with it what its gauges told."""
        self._before = self.newest
        self.take(Stats())
