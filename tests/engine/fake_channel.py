"""The engine's end of the wire without a wire."""

from __future__ import annotations

from engine.messages import FromEngine, Report, ToEngine


class FakeChannel:
    """Hands over what the test put in `inbox`; keeps reports and the timeouts of the loop."""

    def __init__(self) -> None:
        self.inbox: list[ToEngine] = []
        self.reports: list[Report] = []
        self.timeouts: list[float] = []

    def receive(self, timeout: float) -> list[ToEngine]:
        self.timeouts.append(timeout)
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, message: FromEngine) -> None:
        assert isinstance(message, Report)
        self.reports.append(message)
