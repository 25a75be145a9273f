"""What an engine is busy with between two steps: queues, prompts under way, pages."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from engine.messages import Stats
from engine.request import Request
from engine.scheduler import Scheduler


def with_load(stats: Stats, scheduler: Scheduler, requests: Collection[Request]) -> Stats:
    """A copy of `stats` that tells the load as well; `requests` are all live ones."""
    pools, queues = scheduler.pools, scheduler.queues
    running = [request for request in requests if request.slot is not None]
    prefills = [request for request in running if request.is_prefill]
    oldest = min(prefills, key=_first_scheduled, default=None)
    return msgspec.structs.replace(
        stats,
        running=queues.num_running,
        waiting=queues.num_waiting,
        full_used=pools.full.used,
        full_cached=pools.full.cached,
        full_total=pools.full.total,
        window_used=pools.window.used,
        window_cached=pools.window.cached,
        window_total=pools.window.total,
        free_tokens=pools.free_tokens,
        preemptions=queues.preemptions,
        prefix_hit_tokens=queues.prefix_hit_tokens,
        prefill_remaining=queues.prefill_remaining,
        prefilling=len(prefills),
        oldest_prefill_done=0 if oldest is None else oldest.computed,
        oldest_prefill_total=0 if oldest is None else oldest.prompt_len,
        oldest_waiting=_oldest(request for request in requests if request.slot is None),
        oldest_running=_oldest(running),
    )


def _first_scheduled(request: Request) -> float:
    """Seconds; a request that has a slot and was in no step yet comes last."""
    return float("inf") if request.first_scheduled is None else request.first_scheduled


def _oldest(requests: Iterable[Request]) -> float | None:
    """The first arrival, monotonic seconds."""
    return min((request.arrival for request in requests), default=None)
