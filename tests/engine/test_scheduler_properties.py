"""Random histories on pools of a few pages: what a query reads is always its own sequence.

The machine plays the worker. It writes, for every position of every span, what a real worker would
write there, and before that checks everything the span's queries may read: every earlier position
in the full pool, sinks and window in the window pool. What is written names the whole prefix and
the rule of the token, so a page that is shared wrongly, freed early or left over is found at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.batch import Batch, Span
from engine.errors import RequestError
from engine.kv_pools import KvPools
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler

BLOCK = 4
Content = tuple[tuple[int, ...], str]  # all tokens up to a position, and the position's rule


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        full=st.integers(4, 16),
        window=st.integers(4, 16),
        window_tokens=st.integers(1, 9),
        sinks=st.integers(0, 4),
        seqs=st.integers(1, 4),
        budget=st.integers(4, 24),
        absent=st.sampled_from(["none", "none", "full", "window"]),
        caching=st.booleans(),
        generated=st.booleans(),
        aim=st.sampled_from([None, None, 1e-9, 0.01]),
    )
    def start(
        self,
        full: int,
        window: int,
        window_tokens: int,
        sinks: int,
        seqs: int,
        budget: int,
        absent: str,
        caching: bool,
        generated: bool,
        aim: float | None,
    ) -> None:
        self.pools = KvPools(
            full_pages=0 if absent == "full" else full,
            window_pages=0 if absent == "window" else window,
            block_tokens=BLOCK,
            window_tokens=window_tokens,
            sink_tokens=sinks,
            prefix_caching=caching,
            cache_generated=generated,
        )
        self.budget, self.slots = budget, seqs
        self.scheduler = Scheduler(
            self.pools, max_num_seqs=seqs, max_batch_tokens=budget, max_step_seconds=aim
        )
        self.live: dict[int, Request] = {}
        self.full: dict[int, Content] = {}
        self.window: dict[int, Content] = {}
        self.next_id = 0

    @rule(
        shared=st.integers(0, 14),
        own=st.lists(st.integers(0, 1), max_size=6),
        max_tokens=st.integers(0, 12),
        resumed=st.lists(st.integers(0, 1), max_size=4),
        echo=st.booleans(),
    )
    def add(
        self, shared: int, own: list[int], max_tokens: int, resumed: list[int], echo: bool
    ) -> None:
        """Prompts share beginnings; some requests come with output, as after a restart."""
        prompt = ([7, 8, 9] * 5)[:shared] + own or [1]
        logprobs = 0 if echo or not max_tokens else None
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=logprobs)
        output = resumed[: max(max_tokens - 1, 0)]
        request = Request(self.next_id, prompt, params, output=list(output))
        self.next_id += 1
        try:
            self.scheduler.add(request)
        except RequestError:
            return
        self.live[request.request_id] = request

    @precondition(lambda self: self.live)
    @rule(token=st.integers(0, 1), seconds=st.sampled_from([1e-4, 0.005, 3.0]))
    def step(self, token: int, seconds: float = 1e-4) -> None:
        batch = self.scheduler.schedule()
        assert batch.spans, "something is queued, so something must be computed"
        self.check(batch)
        self.scheduler.learn(batch, seconds)
        sampled = {span.request_id: token for span in batch.spans if span.sample}
        self.scheduler.update(batch, sampled)
        for span in batch.spans:
            self.finish_if_done(self.live[span.request_id])

    @precondition(lambda self: self.live)
    @rule()
    def find_no_memory(self) -> None:
        """A step fails part done; the next one is smaller, until one request is at fault."""
        batch = self.scheduler.schedule()
        assert batch.spans
        self.check(batch)
        at_fault = self.scheduler.shrink(batch)
        if at_fault is not None:
            assert {span.request_id for span in batch.spans} == {at_fault}
            self.scheduler.finish(at_fault)
            del self.live[at_fault]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        self.scheduler.finish(request_id)
        del self.live[request_id]

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        """Everything that is left ends by itself, and then no page is in use."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not self.live:
                break
            self.step(0)
        assert not self.live, "some request never ended"
        assert (self.pools.full.used, self.pools.window.used) == (0, 0)
        assert self.scheduler.queues.num_running == self.scheduler.queues.num_waiting == 0
        assert self.scheduler.queues.prefill_remaining == 0

    def finish_if_done(self, request: Request) -> None:
        if not request.is_prefill and len(request.output) >= request.params.max_tokens:
            self.scheduler.finish(request.request_id)
            del self.live[request.request_id]

    def check(self, batch: Batch) -> None:
        """Write and read as a worker would."""
        assert 0 < batch.num_tokens <= self.budget
        slots = [span.slot for span in batch.spans]
        assert len(set(slots)) == len(slots) <= self.slots
        rules = [span.rule for span in batch.spans]
        assert rules == sorted(rules), "decode spans come first"
        for span in batch.spans:
            self.write(span)
        for span in batch.spans:
            self.read(span)

    def write(self, span: Span) -> None:
        request = self.live[span.request_id]
        assert span.tokens == request.tokens(span.start, span.stop)
        assert span.sample == (span.stop == request.total and request.params.max_tokens > 0)
        for position in range(span.start, span.stop):
            assert span.rule == rule_of(request, position), "a span has one rule"
            content = content_of(request, position)
            if self.pools.has_full:
                self.full[slot_of(span.full_blocks, position)] = content
            if self.pools.has_window:
                self.window[slot_of(span.window_blocks, position)] = content

    def read(self, span: Span) -> None:
        request = self.live[span.request_id]
        if self.pools.has_full:
            for position in range(span.stop):
                found = self.full[slot_of(span.full_blocks, position)]
                self.expect(found, request, position)
        if self.pools.has_window:
            first = max(span.start - self.pools.window_tokens + 1, 0)
            sinks = range(min(self.pools.sink_tokens, span.stop))
            for position in {*sinks, *range(first, span.stop)}:
                found = self.window[slot_of(span.window_blocks, position)]
                self.expect(found, request, position)

    def expect(self, found: Content, request: Request, position: int) -> None:
        """With cache_generated, a prompt may lie on pages that were generated."""
        tokens, rule = content_of(request, position)
        assert found[0] == tokens
        assert found[1] == rule or self.pools.cache_generated


def slot_of(blocks: Sequence[int], position: int) -> int:
    page = blocks[position // BLOCK]
    assert page, "the null page is never read or written"
    return page * BLOCK + position % BLOCK


def rule_of(request: Request, position: int) -> str:
    return "prefill" if position < request.prompt_len else "decode"


def content_of(request: Request, position: int) -> Content:
    return tuple(request.tokens(0, position + 1)), rule_of(request, position)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
