"""How many requests may wait, and what to tell those that come when the queue is full."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from engine.errors import QueueFullError

_REMEMBERED = 64  # departures from the queue that the rate is measured over
_DEFAULT_WAIT = 5  # seconds, until a rate is known
_LONGEST_WAIT = 60  # seconds


class AdmissionQueue:
    """The requests of which no part has been computed yet, at most `limit`."""

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._waiting: set[int] = set()
        self._departures: deque[float] = deque(maxlen=_REMEMBERED)

    def __len__(self) -> int:
        return len(self._waiting)

    def check(self) -> None:
        """Raises QueueFullError if one more would be too many."""
        if len(self._waiting) >= self._limit:
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting, the limit", self._retry_after()
            )

    def enter(self, request_id: int) -> None:
        self._waiting.add(request_id)

    def depart(self, request_id: int) -> None:
        """The engine has begun with this request; harmless if it had before."""
        if request_id in self._waiting:
            self._waiting.discard(request_id)
            self._departures.append(self._clock())

    def leave(self, request_id: int) -> None:
        """The request is gone without service; says nothing about the engine's speed."""
        self._waiting.discard(request_id)

    def clear(self) -> None:
        self._waiting.clear()
        self._departures.clear()

    def _retry_after(self) -> int:
        """Seconds in which the present queue passes at the rate measured until now."""
        if len(self._departures) < 2:
            return _DEFAULT_WAIT
        elapsed = self._clock() - self._departures[0]
        seconds = len(self._waiting) * elapsed / len(self._departures)
        return min(max(math.ceil(seconds), 1), _LONGEST_WAIT)
