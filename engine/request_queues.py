"""The requests of an engine: who runs, who waits, and who may begin.

Who runs has a slot and pages; who waits has neither. Requests are admitted first come, first
served, while there is a slot and room for all prompts that are under way; pages in use that one can
share cost nothing. One whose next blocks are just being computed by another waits for them, is
passed by meanwhile, and then shares the pages.

A request that was preempted waits at the head of the queue until every running one has room for a
block more, and for twice as much after each further time: so it is preempted few times, and not
computed again in vain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from engine.errors import RequestError
from engine.kv_pools import KvPools
from engine.prefix_leaders import PrefixLeaders
from engine.request import Request


class RequestQueues:
    """Moves requests between waiting and running. Others read `requests` and `running`."""

    def __init__(self, pools: KvPools, *, max_num_seqs: int, max_batch_tokens: int) -> None:
        """
        Args:
            pools: pages that are shared, counted, and given back here.
            max_num_seqs: slots, that is requests that run together.
            max_batch_tokens: of a step, all chunks in it together.
        """
        self.requests: dict[int, Request] = {}  # all of them, by id
        self.running: list[Request] = []  # oldest admission first
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self._pools = pools
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[Request] = deque()
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._leaders = PrefixLeaders(pools)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def prefill_remaining(self) -> int:
        """Prompt tokens still to compute, of running and waiting requests."""
        return sum(max(r.prompt_len - r.computed, 0) for r in self.requests.values())

    def add(self, request: Request) -> None:
        """A request comes, and waits.

        Raises:
            RequestError: it could not be computed even if it were alone.
        """
        longest = request.prompt_len + request.params.max_tokens
        full, window = self._pools.needed(longest)
        if full > self._pools.full.total or window > self._pools.window.total:
            raise RequestError(
                f"{longest} tokens need {full} full and {window} window pages; the cache has "
                f"{self._pools.full.total} and {self._pools.window.total}"
            )
        self.requests[request.request_id] = request
        self._waiting.append(request)

    def forget(self, request_id: int) -> None:
        """A request is gone, wherever it stood; unknown ids are ignored."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return
        if request.slot is None:
            self._waiting.remove(request)
            self._leaders.forget(request_id)
        else:
            self._stop_running(request)

    def start_step(self, advanced: Iterable[int]) -> None:
        """A step begins; `advanced` are the requests that the step before computed."""
        self._leaders.start_step(advanced)

    def admit(self) -> None:
        """Give slots to waiting requests in order; those that wait for a leader are passed by."""
        passed: list[Request] = []
        while self._waiting and self._free_slots:
            request = self._waiting.popleft()
            if self._leaders.waits(request, self.running):
                passed.append(request)
            elif not self._start(request):
                self._waiting.appendleft(request)
                break
        self._waiting.extendleft(reversed(passed))

    def may_admit(self, leaving: Collection[int]) -> bool:
        """Whether `admit` may find somebody when the requests that are `leaving` have ended."""
        if not self._waiting or leaving:
            return bool(self._waiting)
        head = self._waiting[0]
        held = self._leaders.held_blocks(head, self.running)
        return bool(self._free_slots) and self._has_room(head, held)

    def preempt(self, request: Request) -> None:
        """Take slot and pages from a running request; it waits at the head, all to be computed."""
        self._stop_running(request)
        request.computed = request.cached = 0
        request.preemptions += 1
        self.preemptions += 1
        self._waiting.appendleft(request)

    def check_integrity(self) -> None:
        """Assert the invariants of queues and slots, and those of the pools."""
        self._pools.check_integrity(self.running)
        slots = [request.slot for request in self.running]
        assert None not in slots
        assert len({*slots, *self._free_slots}) == len(slots) + len(self._free_slots)
        assert set(self.requests) == {r.request_id for r in (*self.running, *self._waiting)}
        for request in self.requests.values():
            assert 0 <= request.cached <= request.computed <= request.total
        for request in self._waiting:
            assert request.slot is None
            assert request.computed == 0

    def _start(self, request: Request) -> bool:
        """Give the request a slot and the pages that it can share; False if there is no room."""
        if not self._has_room(request, self._leaders.held_blocks(request, self.running)):
            return False  # the usual case of a full cache, found without a look at every block
        hit = self._pools.match(request)
        if not self._has_room(request, self._pools.in_use(request, hit)):
            return False
        request.slot = self._free_slots.pop()
        self._pools.take(request, hit)
        if not request.preemptions:  # else it may have found its own pages
            self.prefix_hit_tokens += hit
        self._leaders.admit(request)
        self.running.append(request)
        return True

    def _has_room(self, request: Request, held: int) -> bool:
        """Whether all prompts under way and this one fit, and further tokens of each.

        The request shares `held` full pages in use. In the window pool there is to be room for all
        windows, and for the chunks of one step, which share its budget.
        """
        if not self.running:
            return True
        pools, budget = self._pools, self._max_batch_tokens
        further = 1
        if request.preemptions:
            further = pools.block_tokens << (request.preemptions - 1)
        full, window, chunks = -held, 0, 0
        for other in (*self.running, request):
            grown = min(other.total + further, other.prompt_len + other.params.max_tokens)
            missing_full, missing_window = pools.missing(other, grown)
            full += missing_full
            window += missing_window
            if other.remaining > 1:
                whole = pools.needed(grown, min(other.remaining, budget))
                chunks += whole[1] - pools.needed(grown)[1]
        window += min(chunks, pools.blocks(budget))
        enough_full = not pools.has_full or full <= pools.full.available
        return enough_full and (not pools.has_window or window <= pools.window.available)

    def _stop_running(self, request: Request) -> None:
        assert request.slot is not None
        self.running.remove(request)
        self._free_slots.append(request.slot)
        request.slot = None
        self._pools.release(request)
