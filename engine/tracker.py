"""What the engine tells about one request: tokens, progress, timings, token budget, the end."""

from __future__ import annotations

from collections.abc import Sequence

from engine.messages import Attended, Progress, RequestUpdate, Timing, TokenLogprobs
from engine.request import FinishReason, Request
from engine.step import StepResult


class RequestTracker:
    """Follows one request and turns step results into updates. Times are monotonic seconds."""

    def __init__(
        self,
        request: Request,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        progress: Progress | None = None,
    ) -> None:
        """`progress` is what an engine before this one told; its times become the request's."""
        progress = progress if progress is not None else Progress()
        params = request.params
        eos = () if params.ignore_eos else eos_token_ids
        self.request = request
        self._stop_ids = frozenset((*params.stop_token_ids, *eos))
        self._max_total = min(request.prompt_len + params.max_tokens, max_model_len)
        self._attended = progress.attended
        self._prompt_logprobs_sent = progress.prompt_logprobs
        self._cached = progress.cached
        timing = progress.timing
        request.first_scheduled = _after(request.arrival, timing.queue)
        self._first_token = _after(request.first_scheduled, timing.prefill)
        self._last_token = _after(self._first_token, timing.decode)

    @property
    def wants_no_tokens(self) -> bool:
        """Whether the request ends with its prompt (echo without output)."""
        return self.request.params.max_tokens == 0

    def ends_at(self, total: int) -> bool:
        """Whether the request is as long as it may be with `total` tokens, prompt and generated."""
        return total >= self._max_total

    def finish_of(self, token: int) -> FinishReason | None:
        """Whether the request ends with `token`, the newest one of `request.output`."""
        if token in self._stop_ids:
            return "stop"
        return "length" if self.ends_at(self.request.total) else None

    def count_attended(self, step: Attended) -> None:
        self._attended = Attended(
            self._attended.pairs + step.pairs,
            self._attended.tokens + step.tokens,
            self._attended.fraction + step.fraction,
        )

    def update(
        self, result: StepResult, token: int | None, finish: FinishReason | None, now: float
    ) -> RequestUpdate:
        """The update of one step that ended at `now`; `token` is already in `request.output`."""
        request_id = self.request.request_id
        sample = result.samples.get(request_id)
        logprobs = sample.logprobs if sample is not None and token is not None else None
        if token is not None:
            self._last_token = now
            if self._first_token is None:
                self._first_token = now
        accounted = token is not None or finish is not None
        return RequestUpdate(
            request_id=request_id,
            tokens=[] if token is None else [token],
            logprobs=[] if logprobs is None else [logprobs],
            prompt_logprobs=self._new_prompt_logprobs(result),
            prefilled=min(self.request.computed, self.request.prompt_len),
            cached=self._cached_tokens(),
            finish_reason=finish,
            stop_token=token if finish == "stop" else None,
            timing=self._timing(None if finish is None else now),
            attended=self._attended if accounted else None,
        )

    def cut_off(self, reason: FinishReason, now: float) -> RequestUpdate:
        """The last update of a request that ends before it is done."""
        return self.update(StepResult(), None, reason, now)

    def _new_prompt_logprobs(self, result: StepResult) -> list[TokenLogprobs | None]:
        """Those not sent yet: a preempted request computes its prompt again from the start."""
        step = result.prompt_logprobs.get(self.request.request_id)
        if step is None:
            return []
        start, entries = step
        fresh = entries[max(self._prompt_logprobs_sent - start, 0) :]
        self._prompt_logprobs_sent += len(fresh)
        return fresh

    def _cached_tokens(self) -> int:
        """As found when the request began; one that is computed again may find its own pages."""
        if self._cached is None and self.request.first_scheduled is not None:
            self._cached = min(self.request.cached, self.request.prompt_len)
        return self._cached or 0

    def _timing(self, ended: float | None) -> Timing:
        """Phases so far; the one that a request `ended` in counts up to then."""
        started, first = self.request.first_scheduled, self._first_token
        return Timing(
            queue=_between(self.request.arrival, ended if started is None else started),
            prefill=_between(started, ended if first is None else first),
            decode=_between(first, self._last_token),
        )


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _after(start: float | None, seconds: float | None) -> float | None:
    return None if start is None or seconds is None else start + seconds
