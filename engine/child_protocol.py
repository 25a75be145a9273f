"""What the supervisor needs of an engine process: the border between supervision and processes.

`engine.child.EngineChild` is the real one, behind sockets. A simulated child runs an
`engine.core.EngineCore` in the same thread: `send` appends to an inbox that the core's channel
hands out at the next turn; `receive` turns the core until it has sent something (`Ready` comes
first, from `wait_ready`), and advances a simulated clock by what a turn is to cost. A crash is
simulated by raising `ChildEndedError` from `receive`, a hang by advancing the clock by `silence`
and returning None. `step` hands out what the core passed to its `note` last. What was sent before a
crash and not received may be delivered or lost.
Give `EngineProcess` the same clock, and a sleep that advances it, so that no real time passes:

    EngineProcess(config, launch=simulated_launch, clock=clock, sleep=clock.sleep)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.messages import EngineInfo, FromEngine, ToEngine
from engine.step_note import StepNote


class ChildEndedError(EngineError):
    """The engine process is of no use any more: it ended, hangs or speaks nonsense."""


class Child(Protocol):
    """One engine process, from launch to end. All methods are called on one event loop."""

    @property
    def pid(self) -> int:
        """For logs and tests."""
        ...

    def send(self, message: ToEngine) -> None:
        """Queue a message; never waits and never fails, also when the process is gone."""
        ...

    async def receive(self, silence: float) -> FromEngine | None:
        """The next message; None if none came within `silence` seconds.

        Called by one task at a time, and never again after it raised.

        Raises:
            ChildEndedError: the process ended and has left nothing unread, or it sent a frame that
                is no message.
        """
        ...

    def step(self) -> StepNote | None:
        """The step that the engine computes, or was computing when it ended; None between steps.

        It tells how long silence is in order, and who was being computed at a crash.
        """
        ...

    async def wait_ready(self, silence: float) -> EngineInfo:
        """Wait until the model is loaded; called once, before `receive`.

        Raises:
            EngineError: one line for the operator; ConfigError or CheckpointError where it is one.
        """
        ...

    async def shut_down(self, seconds: float) -> None:
        """Ask the process to leave and give it `seconds`; `close` then makes sure."""
        ...

    async def close(self) -> None:
        """Kill the process if it lives and remove all traces; nothing of it arrives after this.

        Called again where it was interrupted; harmless when it was not.
        """
        ...


LaunchChild = Callable[[EngineConfig], Awaitable[Child]]  # starts a process; raises EngineError
