"""Implements `engine.child_protocol.Child` without a process: what it is sent is kept."""

from __future__ import annotations

from engine.messages import EngineInfo, FromEngine, ToEngine
from engine.step_note import StepNote
from tests.engine.toy_info import toy_info


class FakeChild:
    """Tests look at `sent`, and set what it has to say."""

    def __init__(self, pid: int = 1) -> None:
        self.pid = pid
        self.sent: list[ToEngine] = []
        self.says: list[FromEngine] = []
        self.note: StepNote | None = None
        self.closed = 0
        self.interrupted = False  # the next `close` does not get to its end

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    async def receive(self, silence: float) -> FromEngine | None:
        return self.says.pop(0) if self.says else None

    def step(self) -> StepNote | None:
        return self.note

    async def wait_ready(self, silence: float) -> EngineInfo:
        return toy_info()

    async def shut_down(self, seconds: float) -> None: ...

    async def close(self) -> None:
        if self.interrupted:
            self.interrupted = False
            raise InterruptedError
        self.closed += 1
