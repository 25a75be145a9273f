"""How much may wait, and what to tell those that come when that is reached.

Two things are bounded: requests of which no part has been computed yet, and prompt tokens that are
still to compute, over all live requests. The second is the work that a new prompt waits for: what
the engine reports as computed, or as found in the prefix cache, counts no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engine.busy_rate import BusyRate
from engine.errors import QueueFullError, QueueFullReason

DEFAULT_WAIT = 5  # seconds, until a rate is known
LONGEST_WAIT = 60  # seconds
_LEAST_BACKLOG = 2**20  # tokens
_LEAST_PROMPTS = 4  # of the longest


def default_prefill_limit(max_model_len: int) -> int:
    """Prompt tokens that may wait where the operator named no number: a million, or four of the
    longest prompts where that is more."""
    return max(_LEAST_BACKLOG, _LEAST_PROMPTS * max_model_len)


def prefill_charges(prompts: Iterable[bytes], block_tokens: int | None) -> list[int]:
    """Prompt tokens that each request of a call costs.

    Equal prompts share their full pages, so only the first one is computed whole: the others
    compute what follows the last full page, at least one token.

    Args:
        prompts: int32 buffers, as they travel.
        block_tokens: per page; None where nothing is shared.
    """
    charges: list[int] = []
    seen: set[bytes] = set()
    for prompt in prompts:
        cost = len(prompt) // 4
        if block_tokens is not None and prompt in seen:
            cost -= (cost - 1) // block_tokens * block_tokens
        seen.add(prompt)
        charges.append(cost)
    return charges


@dataclass(slots=True)
class _Work:
    """Of one live request, in prompt tokens."""

    prompt_tokens: int
    charge: int  # counted until the engine has begun with it
    left: int = 0


class AdmissionQueue:
    """What was accepted and is not done."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        max_requests: int,
        max_prefill_tokens: int | None = None,
        small_tokens: int = 0,
    ) -> None:
        """
        Args:
            clock: monotonic seconds.
            max_requests: requests that may wait for their first computation.
            max_prefill_tokens: prompt tokens that may wait to be computed; None follows
                `know_longest`.
            small_tokens: a call of at most so many, one step's worth, is bounded by `max_requests`
                alone: a flood of long prompts must not lock short ones out.
        """
        self._derives_limit = max_prefill_tokens is None
        self._max_prefill_tokens = max_prefill_tokens or _LEAST_BACKLOG
        self._max_requests = max_requests
        self._small = small_tokens
        self._clock = clock
        self._waiting: set[int] = set()
        self._work: dict[int, _Work] = {}  # by live request
        self._backlog = 0  # what is left of them in all
        self._held_requests = 0
        self._held_tokens = 0
        self._departures = BusyRate()
        self._prefill = BusyRate()

    def know_longest(self, max_model_len: int) -> None:
        """The longest prompt is known: so is the limit, if none was named."""
        if self._derives_limit:
            self._max_prefill_tokens = default_prefill_limit(max_model_len)

    @property
    def waiting(self) -> int:
        """Requests that wait, those included that are still being tokenised."""
        return len(self._waiting) + self._held_requests

    @property
    def backlog(self) -> int:
        """Prompt tokens still to compute, those included that are still being tokenised."""
        return self._backlog + self._held_tokens

    def check(self, requests: int, prefill_tokens: int) -> None:
        """Whether a call of so many requests and prompt tokens may come in, as a whole.

        What finds nothing before it is always taken: a call that is larger than a limit would
        otherwise never be.

        Raises:
            QueueFullError: not now; `retry_after` is when there would be room at the rate measured
                until now, if nobody else came.
        """
        over = self.waiting + requests - self._max_requests
        if over > 0 and self.waiting:
            raise self._full("queue_full", self._departures, min(over, self.waiting))
        over = self.backlog + prefill_tokens - self._max_prefill_tokens
        if over > 0 and self.backlog and prefill_tokens > self._small:
            raise self._full("prefill_backlog", self._prefill, min(over, self.backlog))

    @contextmanager
    def hold(self, requests: int, prefill_tokens: int) -> Iterator[None]:
        """Count a call while it is tokenised, by the fewest tokens that it can have.

        Raises:
            QueueFullError: as `check`, before any work.
        """
        self.check(requests, prefill_tokens)
        self._held_requests += requests
        self._held_tokens += prefill_tokens
        try:
            yield
        finally:
            self._held_requests -= requests
            self._held_tokens -= prefill_tokens

    def enter(self, request_id: int, prompt_tokens: int, charge: int | None = None) -> None:
        """A request that `check` let in waits.

        Args:
            charge: tokens to count while nothing is known (`prefill_charges`); None: the prompt.
        """
        self._advance()
        self._work[request_id] = _Work(prompt_tokens, prompt_tokens if charge is None else charge)
        self._wait(request_id)
        self._advance()

    def progress(self, request_id: int, prefilled: int, cached: int) -> None:
        """The engine has `prefilled` prompt tokens of a request, `cached` of them were found.
        Harmless for a request that is gone, or that the engine has not begun with."""
        work = self._work.get(request_id)
        if work is None or not prefilled:
            return
        self._advance()
        found = 0
        if request_id in self._waiting:
            self._waiting.discard(request_id)
            self._departures.add(1)
            found = cached
        left = max(work.prompt_tokens - prefilled, 0)
        if (computed := work.left - left - found) > 0:
            self._prefill.add(computed)
        self._set_left(work, left)
        self._advance()

    def leave(self, request_id: int) -> None:
        """A request ended, served or not; harmless if it is gone."""
        work = self._work.pop(request_id, None)
        if work is not None:
            self._advance()
            self._waiting.discard(request_id)
            self._set_left(work, 0)
            self._advance()

    def restart(self) -> None:
        """The engine is lost, and with it what it had computed: all that is live waits again."""
        self._departures, self._prefill = BusyRate(), BusyRate()
        for request_id in self._work:
            self._wait(request_id)
        self._advance()

    def clear(self) -> None:
        """Nothing is live any more."""
        for request_id in list(self._work):
            self.leave(request_id)

    def _wait(self, request_id: int) -> None:
        work = self._work[request_id]
        self._waiting.add(request_id)
        self._set_left(work, work.charge)

    def _set_left(self, work: _Work, left: int) -> None:
        self._backlog += left - work.left
        work.left = left

    def _advance(self) -> None:
        now = self._clock()
        self._departures.advance(now, busy=bool(self._waiting))
        self._prefill.advance(now, busy=self._backlog > 0)

    def _full(self, reason: QueueFullReason, rate: BusyRate, excess: int) -> QueueFullError:
        self._advance()
        seconds = rate.seconds_for(excess)
        whole = DEFAULT_WAIT if seconds is None else math.ceil(round(seconds, 3))
        wait = min(max(whole, 1), LONGEST_WAIT)
        return QueueFullError(
            f"{self.waiting} requests and {self.backlog} prompt tokens are waiting", wait, reason
        )
