"""When an engine counts as lost, and how often it may be started again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionPolicy:
    """Deadlines and limits, in seconds of a monotonic clock."""

    load_seconds: float = 1800.0  # from launch to ready; weights may come from a slow disk
    silence_seconds: float = 120.0  # without a report, idle ones included: it hangs
    stop_seconds: float = 5.0  # from the request to leave until the process is killed
    max_restarts: int = 5  # within restart_window; one more and the engine is dead
    restart_window: float = 600.0
    first_backoff: float = 0.5  # before the second restart within the window; doubles from there
    max_backoff: float = 30.0


class RestartBudget:
    """Counts restarts within a sliding window."""

    def __init__(self, policy: SupervisionPolicy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._spent: deque[float] = deque()

    def spend(self) -> float | None:
        """Take one restart: seconds to wait before it, or None if none is left.

        The first one is free of delay: a single crash should cost its users the reload only.
        """
        now = self._clock()
        while self._spent and now - self._spent[0] >= self._policy.restart_window:
            self._spent.popleft()
        if len(self._spent) >= self._policy.max_restarts:
            return None
        self._spent.append(now)
        recent = len(self._spent) - 1
        if recent == 0:
            return 0.0
        doubled: float = self._policy.first_backoff * 2 ** (recent - 1)
        return min(doubled, self._policy.max_backoff)
