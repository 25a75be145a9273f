"""Listens to one engine process and says when it is lost: by its end, by nonsense, or by silence.

An idle loop reports twice a second and a step of decoding takes far less than a second, so a long
silence means a hang, unless the engine has noted a step that may rightly take longer. All times are
of the injected monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.child_protocol import Child, ChildEndedError
from engine.messages import Report
from engine.supervision import SupervisionPolicy


class Watch:
    """Over one child that is ready."""

    def __init__(
        self, child: Child, device: str, policy: SupervisionPolicy, clock: Callable[[], float]
    ) -> None:
        """`device` as the engine named it: a step may take longer on a CPU."""
        self.child = child
        self._device = device
        self._policy = policy
        self._clock = clock

    def step_seconds(self) -> float:
        """How much longer than an ordinary one the step under way may take; 0 between steps."""
        step = self.child.step()
        return 0.0 if step is None else self._policy.step_seconds(step.tokens, self._device)

    async def next_report(self) -> Report:
        """Raises ChildEndedError when the process is of no use any more; one line says why."""
        begun = self._clock()
        patience = self._policy.silence_seconds
        while True:
            message = await self.child.receive(patience)
            if isinstance(message, Report):
                return message
            if message is not None:
                raise ChildEndedError(f"engine sent {type(message).__name__} while running")
            patience = self._seconds_left()
            if patience <= 0:
                silent = self._clock() - begun
                raise ChildEndedError(f"engine process hangs: silent for {silent:.0f} s")

    def _seconds_left(self) -> float:
        """What the step under way may still take, after a silence that is long for most."""
        step = self.child.step()
        if step is None:
            return 0.0
        allowed = self._policy.silence_seconds + self.step_seconds()
        return step.began + allowed - self._clock()
