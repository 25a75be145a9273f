"""What the simulated engine computes, and what it should have: tokens, log-probabilities, the end.

The toy of `tests.engine.fake_runner` with sampling: with a temperature the next token also depends
on the seed and on how many tokens were sampled, so a request that is resumed with either of them
wrong goes on wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engine.batch import Batch, Span
from engine.messages import EngineInfo, TokenLogprobs
from engine.request import FinishReason, Request, SamplingParams
from engine.step import PendingStep, Sample, StepResult
from tests.engine.fake_runner import EOS, HANG, KILL, NO_MEMORY, NOT_FINITE, RAISE, FakeRunner

POISON = {
    "raise": RAISE,
    "kill": KILL,
    "hang": HANG,
    "not finite": NOT_FINITE,
    "no memory": NO_MEMORY,
}


class KilledError(BaseException):
    """Stands for the end of the process: nothing in the engine may catch it."""


class HungError(BaseException):
    """Stands for a step that never returns."""


def toy_hash(tokens: Sequence[int], state: int = 1) -> int:
    """A number that depends on every token and their order; goes on from `state`."""
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return state


def toy_sample(state: int, count: int, params: SamplingParams) -> tuple[int, float]:
    """Token after a sequence that hashes to `state`, `count` of it generated, and its logprob."""
    if params.temperature > 0:
        state = (state * 31 + params.seed * 7919 + count * 104_729) % 1_000_003
    token = state % EOS
    while count < params.min_tokens and token in params.stop_token_ids:
        token = (token + 1) % EOS
    return token, -(state % 97) / 8


@dataclass(frozen=True, slots=True)
class Expected:
    """The answer of an engine to which nothing ever happens."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


def toy_answer(prompt: Sequence[int], params: SamplingParams, max_model_len: int) -> Expected:
    """The oracle: token after token, without pages, batches or restarts."""
    state = toy_hash(prompt)
    tokens: list[int] = []
    logprobs: list[float] = []
    limit = min(params.max_tokens, max_model_len - len(prompt))
    while len(tokens) < limit:
        token, logprob = toy_sample(state, len(tokens), params)
        state = toy_hash([token], state)
        tokens.append(token)
        logprobs.append(logprob)
        if token in params.stop_token_ids:
            return Expected(tokens, logprobs, "stop")
    return Expected(tokens, logprobs, "length")


@dataclass(frozen=True, slots=True)
class _ObservedStep:
    step: PendingStep
    after: Callable[[], None]

    def finish(self) -> StepResult:
        result = self.step.finish()
        self.after()
        return result


class SimulatedRunner(FakeRunner):
    """Implements `engine.step.Runner`; faults of a step are exceptions that end or hang it.

    `before` is called when a step is started, what it gives when the step is read; both may raise.
    """

    def __init__(self, info: EngineInfo, before: Callable[[Batch], Callable[[], None]]) -> None:
        super().__init__(info)
        self._before = before

    def start(self, batch: Batch, requests: Mapping[int, Request]) -> PendingStep:
        after = self._before(batch)
        return _ObservedStep(super().start(batch, requests), after)

    def _sample(self, span: Span, request: Request) -> Sample:
        tokens = [self._full[self._slot(span.full_blocks, i)] for i in range(span.stop)]
        if NOT_FINITE in tokens:
            return Sample(None)
        count = span.stop - request.prompt_len
        token, logprob = toy_sample(toy_hash(tokens), count, request.params)
        wanted = request.params.logprobs is not None
        return Sample(token, TokenLogprobs(token, logprob, [], []) if wanted else None)

    def _misbehave(self, span: Span, result: StepResult) -> None:
        if NOT_FINITE in span.tokens:
            result.failed.add(span.request_id)
        if RAISE in span.tokens:
            raise RuntimeError("a kernel failed")
        if KILL in span.tokens:
            raise KilledError
        if HANG in span.tokens:
            raise HungError
