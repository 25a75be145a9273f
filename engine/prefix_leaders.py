"""Which waiting request waits for whose prefill, so that equal prompts are computed once."""

from __future__ import annotations

from collections.abc import Iterable

from engine.block_digest import common_blocks
from engine.kv_pools import KvPools
from engine.request import Request


class PrefixLeaders:
    """Pairs of a waiting request and its leader: a running one that computes blocks of both.

    A request waits for the blocks that it has in common with its leader, no longer; and only while
    the leader gets on. A leader that is aborted, preempted or without tokens in a step leads nobody
    from then on, so waiting can neither deadlock nor starve.
    """

    def __init__(self, pools: KvPools) -> None:
        self._pools = pools
        self._leaders: dict[int, tuple[Request, int]] = {}  # by request id: leader, common blocks
        self._advancing: set[int] = set()

    def start_step(self, advanced: Iterable[int]) -> None:
        """Begin a step; `advanced` are the requests that the step before computed."""
        self._advancing = set(advanced)

    def admit(self, request: Request) -> None:
        """A request begins to run: it waits no more, and others may wait for it."""
        self._leaders.pop(request.request_id, None)
        self._advancing.add(request.request_id)

    def forget(self, request_id: int) -> None:
        """A waiting request is gone."""
        self._leaders.pop(request_id, None)

    def waits(self, request: Request, running: Iterable[Request]) -> bool:
        """Whether `request` should wait for one of the running ones; O(1) while it does."""
        pair = self._leaders.pop(request.request_id, None)
        if pair is None or not self._leads(*pair):
            pair = self._find(request, running)
        if pair is not None:
            self._leaders[request.request_id] = pair
        return pair is not None

    def held_blocks(self, request: Request, running: Iterable[Request]) -> int:
        """Most leading blocks of `request` that may lie on pages in use, found by bisection."""
        digests = self._pools.sharable(request)
        held = (min(common_blocks(digests, r.digests), r.registered) for r in running)
        return max(held, default=0)

    def _find(self, request: Request, running: Iterable[Request]) -> tuple[Request, int] | None:
        digests = self._pools.sharable(request)
        for other in running if digests else ():
            common = common_blocks(digests, other.digests)
            next_block = other.registered
            if self._leads(other, common) and not self._pools.is_cached(digests[next_block]):
                return other, common
        return None

    def _leads(self, leader: Request, common: int) -> bool:
        """Whether some of the leading `common` blocks are being computed by `leader`."""
        under_way = leader.slot is not None and leader.is_prefill
        return under_way and leader.registered < common and leader.request_id in self._advancing
