"""A whole request to the engine: its choices, their merged updates, and the accounts at its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from engine.errors import EngineError
from engine.messages import RequestUpdate
from server.choice import Choice, Delta
from server.errors import ApiError, to_api_error
from server.event_stream import Patience
from server.request_record import ChoiceAccount, RequestRecord
from server.service import Service

_TOKEN_BYTES, _LOGPROB_BYTES = 16, 64  # Python objects, or the JSON that they become


class Answer:
    """The choices of one HTTP request. `close` must follow in every case."""

    def __init__(
        self, service: Service, choices: Sequence[Choice], deadline: float, record: RequestRecord
    ) -> None:
        """
        Args:
            deadline: in time.monotonic() seconds.
            record: of the HTTP request; told of every choice when it ends.
        """
        self.choices = choices
        self._service = service
        self._record = record
        record.admitted = time.monotonic()
        self._deadline = deadline
        self._first: dict[int, float] = {}  # by index of a choice: when its first token came
        self._newest: dict[int, float] = {}
        self._closed = False
        self._wakeup = asyncio.Event()
        for choice in choices:
            choice.generation.listen(self._wakeup)

    async def deltas(self, pause: float) -> AsyncIterator[tuple[Choice, Delta] | None]:
        """Deltas of all choices as they come; None whenever nothing came for `pause` seconds.

        Raises:
            ApiError: 408 at the deadline, 500 for a request that failed alone.
            EngineError: the engine was lost.
        """
        open_choices = [choice for choice in self.choices if choice.finish_reason is None]
        while open_choices:
            wait = min(pause, self._deadline - time.monotonic())
            if wait <= 0:
                raise self._expired()
            arrived = [(c, update) for c in open_choices if (update := self._take(c))]
            if not arrived:
                if not await self._woken(wait):
                    yield None
                continue
            for choice, update in arrived:
                delta = choice.push(update)
                self._observe(choice, update)
                if choice.finish_reason == "deadline":  # the engine was first to see it
                    raise self._expired()
                if choice.finish_reason == "error":
                    self.close("error")
                    raise ApiError(500, "the request failed in the engine", code="request_failed")
                yield choice, delta
            open_choices = [choice for choice in open_choices if choice.finish_reason is None]

    def patience(self) -> Patience:
        """With the reader of this answer's stream."""
        config = self._service.config
        return Patience(config.slow_reader_seconds, self.unread_bytes, config.max_unread_bytes)

    def unread_bytes(self) -> int:
        """Memory of what came and was not taken yet, roughly."""
        pending = (choice.generation.unread for choice in self.choices)
        return sum(_size(update) for update in pending if update is not None)

    @property
    def is_paused(self) -> bool:
        """Whether nothing is computed because the engine is being replaced."""
        return self._service.engine.state == "restarting"

    def progress(self) -> tuple[int, int]:
        """Prompt tokens computed and wanted, over all choices."""
        return (
            sum(choice.prefilled for choice in self.choices),
            sum(choice.prompt_tokens for choice in self.choices),
        )

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object; each prompt counts once, however many choices it has."""
        sizes = self._sizes()
        return {
            "prompt_tokens": sizes["prompt_tokens"],
            "completion_tokens": sizes["generated_tokens"],
            "total_tokens": sizes["prompt_tokens"] + sizes["generated_tokens"],
            "prompt_tokens_details": {"cached_tokens": sizes["cached_tokens"]},
        }

    def _sizes(self) -> dict[str, int]:
        prompts = {id(choice.generation.prompt): choice for choice in reversed(self.choices)}
        return {
            "prompt_tokens": sum(choice.prompt_tokens for choice in prompts.values()),
            "cached_tokens": sum(choice.cached for choice in prompts.values()),
            "generated_tokens": sum(choice.generated for choice in self.choices),
        }

    def metrics(self) -> dict[str, float | None]:
        """The `metrics` object (design section 7): the slowest choice, the mean token budget."""
        timings = [choice.timing for choice in self.choices]
        attended = [choice.attended for choice in self.choices]
        pairs = sum(one.pairs for one in attended)
        tokens = sum(one.tokens for one in attended)
        fraction = sum(one.fraction for one in attended)
        firsts = [first - self._record.arrived for first in self._first.values()]
        return {
            "queue_seconds": _largest(timing.queue for timing in timings),
            "prefill_seconds": _largest(timing.prefill for timing in timings),
            "decode_seconds": _largest(timing.decode for timing in timings),
            "time_to_first_token_seconds": _largest(firsts),
            "attended_tokens_mean": tokens / pairs if pairs else None,
            "attended_fraction": fraction / pairs if pairs else None,
        }

    def close(self, reason: str | None = None) -> None:
        """Abort what still runs and account every choice once; `reason` if it was cut off.

        The first call counts: whoever knows the reason calls before the connection ends.
        """
        if self._closed:
            return
        self._closed = True
        self._record.timings = self.metrics()
        self._record.usage = self._sizes()
        for choice in self.choices:
            choice.generation.abort()
            account = ChoiceAccount(
                reason=choice.finish_reason or reason or "abort",
                prompt_tokens=choice.prompt_tokens,
                cached_tokens=choice.cached,
                generated_tokens=choice.generated,
                timing=choice.timing,
                attended=choice.attended,
                first_token=self._first.get(choice.index),
                resumes=choice.generation.resumes,
            )
            self._record.choices.append(account)
            self._service.metrics.observe_choice(account, self._record)

    def failed(self, error: Exception) -> ApiError:
        """What a stream that cannot go on tells its client; the record keeps it too."""
        api_error = to_api_error(error)
        self._record.error_code = api_error.reason
        return api_error

    def _expired(self) -> ApiError:
        self.close("deadline")
        return ApiError(408, "the deadline of this request has passed", code="deadline_exceeded")

    def _take(self, choice: Choice) -> RequestUpdate | None:
        """The choice's next update; raises EngineError if the engine was lost."""
        try:
            return choice.generation.take()
        except EngineError:
            self.close("engine_lost")
            raise

    async def _woken(self, wait: float) -> bool:
        """Whether an update came within `wait` seconds."""
        try:
            async with asyncio.timeout(wait):
                await self._wakeup.wait()
        except TimeoutError:
            return False
        self._wakeup.clear()
        return True

    def _observe(self, choice: Choice, update: RequestUpdate) -> None:
        if not update.tokens:
            return
        now, before = time.monotonic(), self._newest.get(choice.index)
        if before is None:
            self._first[choice.index] = now
            self._service.metrics.observe_first_token(now, self._record)
        else:
            self._service.metrics.observe_tokens(now - before, len(update.tokens), self._record)
        self._newest[choice.index] = now


def _size(update: RequestUpdate) -> int:
    """Bytes of an update, roughly; every position has as many log-probabilities as the first."""
    tops = 1 + len(update.logprobs[0].top_ids) if update.logprobs else 0
    return len(update.tokens) * _TOKEN_BYTES + len(update.logprobs) * tops * _LOGPROB_BYTES


def _largest(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
