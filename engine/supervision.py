"""When an engine counts as lost, and how often it may be started again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionPolicy:
    """Deadlines and limits, in seconds of a monotonic clock."""

    load_seconds: float = 1800.0  # from launch to ready; weights may come from a slow disk
    silence_seconds: float = 120.0  # without a report, idle ones included: it hangs; and besides,
    seconds_per_token: float = 0.01  # for each token of the step under way, on an accelerator
    seconds_per_token_cpu: float = 0.1
    stop_seconds: float = 5.0  # from the request to leave until the process is killed
    max_restarts: int = 5  # within restart_window; one more and the engine is dead
    restart_window: float = 600.0
    first_backoff: float = 0.5  # before the second restart within the window; doubles from there
    max_backoff: float = 30.0
    start_seconds: float = 600.0  # of starts that fail, one after another; then it is dead
    max_resumes: int = 3  # of a request that gets no further; then it fails alone
    poison_seconds: float = 600.0  # for which a request that ended the engine is refused

    def step_seconds(self, tokens: int, device: str) -> float:
        """How long a step of so many tokens may take beyond an ordinary one.

        A chunk of a very long prompt may rightly take minutes on a CPU; steps of one token for
        each sequence come far below `silence_seconds`.
        """
        on_cpu = device == "cpu"
        return tokens * (self.seconds_per_token_cpu if on_cpu else self.seconds_per_token)

    def backoff(self, before: int) -> float:
        """Seconds to wait before a start that follows `before` others without success."""
        if before == 0:
            return 0.0
        doubled: float = self.first_backoff * 2 ** min(before - 1, 30)
        return min(doubled, self.max_backoff)


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
        return self._policy.backoff(len(self._spent) - 1)

    def give_back(self, count: int) -> None:
        """The newest `count` restarts were one request's doing: they say nothing of the engine."""
        for _ in range(min(count, len(self._spent))):
            self._spent.pop()
