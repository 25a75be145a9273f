"""What to compute next: decode first, then prefill in chunks, under one token budget per step.

Policy, in the order it is applied at every step:

1. Every running request that decodes gets its one token.
2. Waiting requests are admitted first come, first served, while there is a slot and room for all
   prompts that are under way; pages in use that it can share cost nothing. A request whose next
   blocks are just being computed by another one waits for them and then shares the pages.
3. What is left of the budget goes to prompts, and to generated tokens that are replayed. The oldest
   gets at least half, the others share the rest, shortest first; so a prompt of a million tokens
   neither starves short ones nor is starved by them.
4. Where several sequences run, the budget is time as well (`max_step_seconds`): chunks are cut by
   the time that they are foreseen to take, shared in the same way. They get a third of the step at
   least, the oldest and the shortest other prompt a block. Who runs alone takes whole steps.

When pages run out, cached ones are evicted, then the newest running request is preempted: its pages
are freed, it waits at the head of the queue and is computed again, its output included. The oldest
running request is never preempted, so it always gets on. A request that was preempted waits until
every running one has room for a block more, and for twice as much after each further time: so it is
preempted few times, and not computed again in vain.

When a step finds no memory beside the pages, it is put together again with less (`shrink`): whoever
runs it may try as often as it fails, since nothing but pages is taken before `update`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

from engine.batch import Batch, Span
from engine.errors import RequestError
from engine.kv_pools import KvPools
from engine.look_ahead import next_rows
from engine.pacing import NO_LIMIT, Pacer, Room
from engine.prefix_leaders import PrefixLeaders
from engine.request import Request
from engine.step_limits import StepLimits


class Scheduler:
    """Turns requests into batches. Torch-free and clockless: whoever runs it stamps times."""

    def __init__(
        self,
        pools: KvPools,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_step_seconds: float | None = None,
    ) -> None:
        """
        Args:
            pools: the pages to hand out.
            max_num_seqs: slots, that is sequences computed together.
            max_batch_tokens: tokens per step, at least max_num_seqs.
            max_step_seconds: aim of a step in which others wait for tokens; None: no aim.
        """
        assert max_batch_tokens >= max_num_seqs
        self.pools = pools
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # oldest admission first
        self._requests: dict[int, Request] = {}
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._leaders = PrefixLeaders(pools)
        self._limits = StepLimits(max_batch_tokens, pools.block_tokens)
        self._step = 0
        self._pacer = Pacer(max_step_seconds, pools.block_tokens)
        self._spans: dict[int, Span] = {}  # of the step that is being put together
        self._budget = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def prefill_remaining(self) -> int:
        """Prompt tokens still to compute, of running and waiting requests."""
        return sum(max(r.prompt_len - r.computed, 0) for r in self._requests.values())

    def add(self, request: Request) -> None:
        """Queue a request; one with output is a resumed one, whose output is replayed.

        Raises:
            RequestError: it could not be computed even if it were alone.
        """
        longest = request.prompt_len + request.params.max_tokens
        full, window = self.pools.needed(longest)
        if full > self.pools.full.total or window > self.pools.window.total:
            raise RequestError(
                f"{longest} tokens need {full} full and {window} window pages; the cache has "
                f"{self.pools.full.total} and {self.pools.window.total}"
            )
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def finish(self, request_id: int) -> None:
        """Forget a request that ended or is given up, wherever it stands; unknown ids are ignored.

        Pages of its prompt that are in the prefix cache stay there.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        if request.slot is None:
            self._waiting.remove(request)
            self._leaders.forget(request_id)
        else:
            self._stop_running(request)

    def schedule(self) -> Batch:
        """The next step. Empty only if nothing is queued."""
        self._leaders.start_step(self._spans)
        self._spans = {}
        self._budget = self._max_batch_tokens
        if self._limits.apart:
            self._take_turns()
        else:
            self._compute_rows()
            self._admit()
            self._share_budget([r for r in self._running if not r.is_row])
            if not self._spans:  # one that was just admitted found all but its last token cached
                self._compute_rows()
        decodes = [span for span in self._spans.values() if span.rule == "decode"]
        prefills = [span for span in self._spans.values() if span.rule == "prefill"]
        return Batch(decodes + prefills)

    def follow(self, batch: Batch, leaving: Collection[int]) -> Batch | None:
        """The step after one that is still to be read, where that is certain but for the tokens.

        None where it depends on what is read: where a step of all running requests would not be
        one new token of each, or somebody may be admitted, preempted, or short of pages. Otherwise
        pages are taken, and nothing is given back.

        Args:
            batch: what is under way; all of it is new tokens.
            leaving: requests that end with it.
        """
        if self._limits.active or len(batch.spans) < len(self._running) or self._may_admit(leaving):
            return None
        rows = batch.without(leaving).spans
        return next_rows(rows, [self._requests[span.request_id] for span in rows], self.pools)

    def update(self, batch: Batch, tokens: Mapping[int, int]) -> None:
        """Take over the results of a step: computed positions, then sampled tokens by request id.

        Requests that were finished since `schedule` are skipped.
        """
        self._limits.went_well()
        self._step += 1
        for span in batch.spans:
            request = self._requests.get(span.request_id)
            if request is None:
                continue
            request.computed = span.stop
            request.last_step = self._step
            self.pools.commit(request)
            if span.sample and span.request_id in tokens:
                request.output.append(tokens[span.request_id])

    def shrink(self, batch: Batch) -> int | None:
        """There was no memory for a step: nothing of it counts, and the next ones hold less.

        Returns:
            The request at fault where the step was as small as can be; finish it.
        """
        return self._limits.shrink(batch)

    def foresee(self, batch: Batch) -> float:
        """Seconds that a step will take, by those that were learnt from; 0: nothing is known."""
        return self._pacer.foresee(batch.spans)

    def learn(self, batch: Batch, seconds: float) -> None:
        """Take over how long a step took (`engine.messages.Stats` says from when to when)."""
        self._pacer.learn(batch.spans, seconds)

    def check_integrity(self) -> None:
        """Assert the invariants of queues, slots and pools; for tests and the idle loop."""
        self.pools.check_integrity(self._running)
        slots = [request.slot for request in self._running]
        assert None not in slots
        assert len({*slots, *self._free_slots}) == len(slots) + len(self._free_slots)
        assert set(self._requests) == {r.request_id for r in (*self._running, *self._waiting)}
        for request in self._requests.values():
            assert 0 <= request.cached <= request.computed <= request.total
        for request in self._waiting:
            assert request.slot is None
            assert request.computed == 0

    def _compute(self, request: Request, tokens: int, *, may_preempt: bool) -> None:
        """Put up to `tokens` positions of a request into the step, as many as pages can be had."""
        start = request.computed
        limit = request.prompt_len if request.is_prefill else request.total
        stop = min(start + min(tokens, self._budget), limit)
        while (reachable := self.pools.reachable(request)) <= start:
            if not may_preempt or not self._preempt_for(request):
                return
        stop = min(stop, reachable)
        if stop <= start:
            return
        self.pools.grow(request, stop)
        self._budget -= stop - start
        assert request.slot is not None
        self._spans[request.request_id] = Span(
            request_id=request.request_id,
            slot=request.slot,
            start=start,
            tokens=request.tokens(start, stop),
            rule="prefill" if start < request.prompt_len else "decode",
            full_blocks=request.full_blocks,
            window_blocks=request.window_blocks,
            sample=stop == request.total and request.params.max_tokens > 0,
            epoch=request.preemptions,
        )

    def _compute_rows(self) -> None:
        """Every request that decodes gets its token, as far as the limits let it."""
        for request in self._limits.rows([r for r in self._running if r.is_row]):
            if request.slot is not None:
                self._compute(request, 1, may_preempt=True)

    def _take_turns(self) -> None:
        """Memory is short: one chunk of one request, or rows; what waited longest comes first."""
        self._admit()
        chunks = sorted((r for r in self._running if not r.is_row), key=lambda r: r.last_step)
        rows = [r.last_step for r in self._running if r.is_row]
        if rows and (not chunks or min(rows) <= chunks[0].last_step):
            self._compute_rows()
        for request in chunks:
            if not self._spans and request.slot is not None:
                self._budget = self._limits.chunk_tokens(self._max_batch_tokens)
                self._compute(request, self._budget, may_preempt=request is self._running[0])
        if not self._spans:
            self._compute_rows()

    def _share_budget(self, requests: list[Request]) -> None:
        """Divide what is left of the step between unfinished prompts and replays."""
        self._budget = self._limits.chunk_tokens(self._budget)
        if not requests or not self._budget:
            return
        oldest, others = requests[0], sorted(requests[1:], key=lambda r: r.remaining)
        others_want = sum(request.remaining for request in others)
        tokens = max(self._budget - others_want, -(-self._budget // 2))
        room = self._pacer.share(self._room(), others)
        least = self._pacer.to_block_end(oldest)
        tokens = max(self._pacer.cut(oldest, tokens, room), min(tokens, least))
        self._compute(oldest, tokens, may_preempt=True)
        for place, request in enumerate(others):
            if request.slot is None or not self._budget:
                continue
            tokens = self._pacer.cut(request, self._budget, self._room())
            least = self._pacer.to_block_end(request) if place == 0 else 0
            if tokens := max(tokens, min(self._budget, least)):
                self._compute(request, tokens, may_preempt=False)

    def _room(self) -> Room:
        """What is left for chunks in the step that is put together."""
        return self._pacer.room(self._spans.values()) if len(self._running) > 1 else NO_LIMIT

    def _admit(self) -> None:
        """Move waiting requests into slots in order; those that wait for a leader are passed by."""
        passed: list[Request] = []
        while self._waiting and self._free_slots:
            request = self._waiting.popleft()
            if self._leaders.waits(request, self._running):
                passed.append(request)
            elif not self._start(request):
                self._waiting.appendleft(request)
                break
        self._waiting.extendleft(reversed(passed))

    def _may_admit(self, leaving: Collection[int]) -> bool:
        """Whether one that waits may get a slot after this step."""
        if not self._waiting or leaving:
            return bool(self._waiting)
        head = self._waiting[0]
        held = self._leaders.held_blocks(head, self._running)
        return bool(self._free_slots) and self._has_room(head, held)

    def _start(self, request: Request) -> bool:
        """Give the request a slot and the pages that it can share; False if there is no room."""
        if not self._has_room(request, self._leaders.held_blocks(request, self._running)):
            return False  # the usual case of a full cache, found without a look at every block
        hit = self.pools.match(request)
        if not self._has_room(request, self.pools.in_use(request, hit)):
            return False
        request.slot = self._free_slots.pop()
        self.pools.take(request, hit)
        if not request.preemptions:  # else it may have found its own pages
            self.prefix_hit_tokens += hit
        self._leaders.admit(request)
        self._running.append(request)
        return True

    def _has_room(self, request: Request, held: int) -> bool:
        """Whether all prompts under way and this one fit, and further tokens of each.

        The request shares `held` full pages in use. In the window pool there is to be room for all
        windows, and for the chunks of one step, which share its budget.
        """
        if not self._running:
            return True
        pools, budget = self.pools, self._max_batch_tokens
        further = 1
        if request.preemptions:
            further = pools.block_tokens << (request.preemptions - 1)
        full, window, chunks = -held, 0, 0
        for other in (*self._running, request):
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

    def _preempt_for(self, request: Request) -> bool:
        """Free the newest running request if it is newer than `request`; False if there is none."""
        victim = self._running[-1]
        if victim is request:
            return False
        span = self._spans.pop(victim.request_id, None)
        if span is not None:
            self._budget += len(span.tokens)
        self._stop_running(victim)
        victim.computed = victim.cached = 0
        victim.preemptions += 1
        self.preemptions += 1
        self._waiting.appendleft(victim)
        return True

    def _stop_running(self, request: Request) -> None:
        assert request.slot is not None
        self._running.remove(request)
        self._free_slots.append(request.slot)
        request.slot = None
        self.pools.release(request)
