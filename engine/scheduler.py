"""What to compute next: decode first, then prefill in chunks, under one token budget per step.

Policy, in the order in which it is applied at every step:

1. Every running request that decodes gets its one token.
2. Waiting requests are admitted, in order, while there is a slot and room for them; equal prompts
   are computed once (`engine.request_queues`).
3. What is left of the budget goes to prompts, and to generated tokens that are replayed. The oldest
   gets at least half, the others share the rest, shortest first; so a prompt of a million tokens
   neither starves short ones nor is starved by them.
4. Where several sequences run, the budget is time as well (`max_step_seconds`): chunks are cut by
   the time that they are foreseen to take, shared in the same way. They get a third of the step at
   least, the oldest and the shortest other prompt a block. Who runs alone takes whole steps.

When pages run out, cached ones are evicted, then the newest running request is preempted: its pages
are freed, it waits at the head of the queue and is computed again, its output included. The oldest
running request is never preempted, so it always gets on.

When a step finds no memory beside the pages, it is put together again with less (`shrink`): whoever
runs it may try as often as it fails, since nothing but pages is taken before `update`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from engine.batch import Batch
from engine.kv_pools import KvPools
from engine.look_ahead import next_rows
from engine.pacing import NO_LIMIT, Pacer, Room
from engine.request import Request
from engine.request_queues import RequestQueues
from engine.step_draft import StepDraft
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
        self.queues = RequestQueues(
            pools, max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens
        )
        self._max_batch_tokens = max_batch_tokens
        self._limits = StepLimits(max_batch_tokens, pools.block_tokens)
        self._pacer = Pacer(max_step_seconds, pools.block_tokens)
        self._draft = StepDraft(max_batch_tokens, pools)  # of the newest step
        self._step = 0

    def add(self, request: Request) -> None:
        """Queue a request; one with output is a resumed one, whose output is replayed.

        Raises:
            RequestError: it could not be computed even if it were alone.
        """
        self.queues.add(request)

    def finish(self, request_id: int) -> None:
        """Forget a request that ended or is given up, wherever it stands; unknown ids are ignored.

        Pages of its prompt that are in the prefix cache stay there.
        """
        self.queues.forget(request_id)

    def schedule(self) -> Batch:
        """The next step. Empty only if nothing is queued."""
        self.queues.start_step(self._draft.spans)
        self._draft = StepDraft(self._max_batch_tokens, self.pools)
        if self._limits.apart:
            self._take_turns()
        else:
            self._compute_rows()
            self.queues.admit()
            self._share_budget([r for r in self.queues.running if not r.is_row])
            if self._draft.is_empty:  # one just admitted found all but its last token cached
                self._compute_rows()
        return self._draft.batch()

    def follow(self, batch: Batch, leaving: Collection[int]) -> Batch | None:
        """The step after one that is still to be read, where that is certain but for the tokens.

        None where it depends on what is read: where a step of all running requests would not be
        one new token of each, or somebody may be admitted, preempted, or short of pages. Otherwise
        pages are taken, and nothing is given back.

        Args:
            batch: what is under way; all of it is new tokens.
            leaving: requests that end with it.
        """
        queues = self.queues
        if self._limits.active or len(batch.spans) < queues.num_running:
            return None
        if queues.may_admit(leaving):
            return None
        rows = batch.without(leaving).spans
        return next_rows(rows, [queues.requests[span.request_id] for span in rows], self.pools)

    def update(self, batch: Batch, tokens: Mapping[int, int]) -> None:
        """Take over the results of a step: computed positions, then sampled tokens by request id.

        Requests that were finished since `schedule` are skipped.
        """
        self._limits.went_well()
        self._step += 1
        for span in batch.spans:
            request = self.queues.requests.get(span.request_id)
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
        self.queues.check_integrity()

    def _compute(self, request: Request, tokens: int, *, may_preempt: bool) -> None:
        """Put up to `tokens` positions of a request into the step, as many as pages can be had."""
        while not self._draft.add(request, tokens):
            if not may_preempt or not self._preempt_for(request):
                return

    def _preempt_for(self, request: Request) -> bool:
        """Free the newest running request if it is newer than `request`; False if there is none."""
        victim = self.queues.running[-1]
        if victim is request:
            return False
        self._draft.drop(victim.request_id)
        self.queues.preempt(victim)
        return True

    def _compute_rows(self) -> None:
        """Every request that decodes gets its token, as far as the limits let it."""
        for request in self._limits.rows([r for r in self.queues.running if r.is_row]):
            if request.slot is not None:
                self._compute(request, 1, may_preempt=True)

    def _take_turns(self) -> None:
        """Memory is short: one chunk of one request, or rows; what waited longest comes first."""
        self.queues.admit()
        running, draft = self.queues.running, self._draft
        chunks = sorted((r for r in running if not r.is_row), key=lambda r: r.last_step)
        rows = [r.last_step for r in running if r.is_row]
        if rows and (not chunks or min(rows) <= chunks[0].last_step):
            self._compute_rows()
        for request in chunks:
            if draft.is_empty and request.slot is not None:
                draft.budget = self._limits.chunk_tokens(self._max_batch_tokens)
                self._compute(request, draft.budget, may_preempt=request is running[0])
        if draft.is_empty:
            self._compute_rows()

    def _share_budget(self, requests: list[Request]) -> None:
        """Divide what is left of the step between unfinished prompts and replays."""
        draft, pacer = self._draft, self._pacer
        draft.budget = self._limits.chunk_tokens(draft.budget)
        if not requests or not draft.budget:
            return
        oldest, others = requests[0], sorted(requests[1:], key=lambda r: r.remaining)
        others_want = sum(request.remaining for request in others)
        tokens = max(draft.budget - others_want, -(-draft.budget // 2))
        room = pacer.share(self._room(), others)
        least = pacer.to_block_end(oldest)
        tokens = max(pacer.cut(oldest, tokens, room), min(tokens, least))
        self._compute(oldest, tokens, may_preempt=True)
        for place, request in enumerate(others):
            if request.slot is None or not draft.budget:
                continue
            tokens = pacer.cut(request, draft.budget, self._room())
            least = pacer.to_block_end(request) if place == 0 else 0
            if tokens := max(tokens, min(draft.budget, least)):
                self._compute(request, tokens, may_preempt=False)

    def _room(self) -> Room:
        """What is left for chunks in the step that is put together."""
        alone = self.queues.num_running <= 1
        return NO_LIMIT if alone else self._pacer.room(self._draft.spans.values())
