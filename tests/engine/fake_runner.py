"""A model of integers: it keeps tokens in pages, as a real one keeps keys and values.

The next token is a function of all tokens read back through the block tables. A page that was
freed too early, shared wrongly or left over from another request changes the answer, so equality
with `toy_generate` is a test of scheduler and core together. Certain prompt tokens make it fail.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engine.batch import NEWEST_TOKEN, Batch, Span
from engine.counter_rng import uniform
from engine.errors import StepMemoryError
from engine.messages import Attended, EngineInfo, TokenLogprobs
from engine.request import Request
from engine.step import PendingStep, Sample, StepResult

VOCAB = 100


WINDOW, SINKS = 8, 2  # tokens


EOS = 89  # never produced by toy_next, so that lengths are predictable


NOT_FINITE = 90  # the row that carries this token has logits that are not finite


RAISE = 91  # the step raises


KILL = 92  # the process dies as by kill -9


HANG = 93  # the step never returns


NO_MEMORY = 94  # a step with this token finds no memory, however small it is


NO_GRAPHS = 95  # the step raises in an engine with CUDA graphs


NO_KERNELS = 96  # the step raises in an engine with CUDA kernels


def toy_next(tokens: Sequence[int]) -> int:
    """The token after `tokens`; depends on every one of them and on their order."""
    state = 1
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return state % EOS


def toy_generate(prompt: Sequence[int], count: int, seed: int | None = None) -> list[int]:
    """What an engine around FakeRunner must answer, greedily or drawn with a seed."""
    tokens = list(prompt)
    for index in range(count):
        tokens.append(toy_next(tokens) if seed is None else toy_draw(tokens, seed, index))
    return tokens[len(prompt) :]


def toy_draw(tokens: Sequence[int], seed: int, index: int) -> int:
    """Token `index` of the output of a request that samples: by its counter-based draw."""
    return (toy_next(tokens) + int(uniform(seed, index) * EOS)) % EOS


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """Implements `engine.step.PendingStep`: computed, but its results come later."""

    result: StepResult
    ready: float = 0.0  # seconds of the monotonic clock
    read: Callable[[], object] = int

    def finish(self) -> StepResult:
        self.read()
        wait = self.ready - time.monotonic()
        if wait > 0:  # even a sleep of nothing gives the core away
            time.sleep(wait)
        return self.result


class FakeRunner:
    """Implements `engine.step.Runner`. Steps are computed when they are started, in order, as on a
    stream of a device, which keeps the newest token of each slot."""

    def __init__(
        self,
        info: EngineInfo,
        step_seconds: float = 0.0,
        broken: Sequence[int] = (),
        *,
        overlaps: bool = False,
    ) -> None:
        """
        Args:
            info: what the front end is told.
            step_seconds: real time that each step takes, so that a test can act during it.
            broken: tokens that make a step raise, beside those that always do.
            overlaps: that steps may be started before the one before is read.
        """
        self.info = info
        self.overlaps = overlaps
        self._step_seconds = step_seconds
        self._ready = 0.0  # when the newest step is done
        self._raises = {RAISE, *broken}
        self.forgotten: list[int] = []
        self.memory: int | None = None  # tokens that a step may hold
        self.steps: list[Batch] = []
        self._full: dict[int, int] = {}  # slot of the cache -> token
        self._windowed: dict[int, int] = {}
        self._newest: dict[int, int] = {}  # slot of a sequence -> token
        self._writes: deque[dict[int, int]] = deque()  # of steps not read: page -> request id

    def start(self, batch: Batch, requests: Mapping[int, Request]) -> PendingStep:
        if self._step_seconds:
            self._ready = max(self._ready, time.monotonic()) + self._step_seconds
        self._check_under_way(batch)
        result = self.compute(batch, requests)
        self._writes.append({p: s.request_id for s in batch.spans for p in self._written(s)})
        return FinishedStep(result, self._ready, self._writes.popleft)

    def compute(self, batch: Batch, requests: Mapping[int, Request]) -> StepResult:
        asked, batch = batch, Batch([self._with_tokens(span) for span in batch.spans])
        self._claim_memory(batch)
        self.steps.append(asked)  # that found memory
        result = StepResult()
        for span in batch.spans:
            self._store(span)
            self._misbehave(span, result)
        for span in batch.spans:
            self._check_window(span, requests[span.request_id])
            if span.sample:
                request = requests[span.request_id]
                sample = self._sample(span, request)
                result.samples[span.request_id] = sample
                self._newest[span.slot] = 0 if sample.token is None else sample.token
            if span.rule == "decode" and span.sample:
                result.attended[span.request_id] = Attended(1, span.stop // 2, 0.5)
                result.layer_attended_fraction[0] = 0.5
            asks = requests[span.request_id].params.prompt_logprobs is not None
            if span.rule == "prefill" and asks:
                result.prompt_logprobs[span.request_id] = _toy_prompt_logprobs(span)
        return result

    def forget(self, request_id: int) -> None:
        self.forgotten.append(request_id)

    def _check_under_way(self, batch: Batch) -> None:
        """At most one step is, this one goes on from it, and its pages are still those of the same
        requests: a real runner may have to wipe them when it is read."""
        assert len(self._writes) <= 1
        for writes in self._writes:
            for span in batch.spans:
                assert span.tokens == [NEWEST_TOKEN]
                for page in {*span.full_blocks, *(-page for page in span.window_blocks)}:
                    assert writes.get(page, span.request_id) == span.request_id, "taken too early"

    def _written(self, span: Span) -> set[int]:
        """Pages that a span stores to; those of the window pool as negative numbers."""
        block = self.info.block_tokens
        places = range(span.start // block, (span.stop - 1) // block + 1)
        return {page for i in places for page in (span.full_blocks[i], -span.window_blocks[i])}

    def _with_tokens(self, span: Span) -> Span:
        known = span.tokens != [NEWEST_TOKEN]
        return span if known else span._replace(tokens=[self._newest[span.slot]])

    def _claim_memory(self, batch: Batch) -> None:
        """Fail where there is none, half-way, as a real step does."""
        short = self.memory is not None and batch.num_tokens > self.memory
        if short or any(NO_MEMORY in span.tokens for span in batch.spans):
            for span in batch.spans[: len(batch.spans) // 2 + 1]:
                self._store(span)
            raise StepMemoryError("out of memory")

    def _store(self, span: Span) -> None:
        for position, token in enumerate(span.tokens, span.start):
            self._full[self._slot(span.full_blocks, position)] = token
            self._windowed[self._slot(span.window_blocks, position)] = token

    def _sample(self, span: Span, request: Request) -> Sample:
        tokens = [self._full[self._slot(span.full_blocks, i)] for i in range(span.stop)]
        if NOT_FINITE in tokens:
            return Sample(None)
        params, token = request.params, toy_next(tokens)
        if params.temperature > 0:
            token = toy_draw(tokens, params.seed, span.stop - request.prompt_len)
        if params.logprobs is None:
            return Sample(token)
        tops = [(token + place) % EOS for place in range(params.logprobs)]
        values = [-span.stop / 8 - place for place in range(params.logprobs)]
        return Sample(token, TokenLogprobs(token, -span.stop / 8, tops, values))

    def _check_window(self, span: Span, request: Request) -> None:
        """Every token that the window rule lets this span see must still be there."""
        sequence = request.tokens(0, span.start) + span.tokens
        first = max(span.start - WINDOW + 1, 0)
        for position in {*range(min(SINKS, span.stop)), *range(first, span.stop)}:
            slot = self._slot(span.window_blocks, position)
            assert self._windowed[slot] == sequence[position], f"window page lost: {position}"

    def _slot(self, blocks: list[int], position: int) -> int:
        page = blocks[position // self.info.block_tokens]
        assert page > 0, f"position {position} lies on the null page"
        return page * self.info.block_tokens + position % self.info.block_tokens

    def _misbehave(self, span: Span, result: StepResult) -> None:
        if NOT_FINITE in span.tokens:
            result.failed.add(span.request_id)
        if not self._raises.isdisjoint(span.tokens):
            raise RuntimeError("a kernel failed")
        if KILL in span.tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANG in span.tokens:
            threading.Event().wait()


def _toy_prompt_logprobs(span: Span) -> tuple[int, list[TokenLogprobs | None]]:
    entries: list[TokenLogprobs | None] = [
        TokenLogprobs(token, -float(position), [], []) if position else None
        for position, token in enumerate(span.tokens, span.start)
    ]
    return span.start, entries
