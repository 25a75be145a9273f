"""What happened in a run, in order: for the checker, and for whoever replays a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from engine.messages import RequestUpdate

# How a choice ended for its client. "finished" is the engine's stop or length.
End = Literal["finished", "error", "deadline", "left", "failed", "refused"]


@dataclass(slots=True)
class ChoiceStory:
    """One choice as its client saw it."""

    client: int
    index: int
    updates: list[RequestUpdate] = field(default_factory=list)
    ends: list[tuple[End, str]] = field(default_factory=list)  # exactly one; with a message
    began: float = 0.0  # when it was admitted

    @property
    def tokens(self) -> list[int]:
        return [token for update in self.updates for token in update.tokens]


class History:
    """Lines with their times, the stories of all choices, and what was found wrong on the way."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.stories: list[ChoiceStory] = []
        self.violations: list[str] = []
        self.launch_times: list[float] = []  # of engine processes, also of those that did not start
        self.refused_start = False  # the first one did not get ready, so there was no service
        self._generated = 0
        self._clock = clock
        self._lines: list[tuple[float, str, tuple[object, ...]]] = []

    @property
    def launches(self) -> int:
        return len(self.launch_times)

    def note(self, text: str, *values: object) -> None:
        """A line; formatted only if somebody reads it."""
        self._lines.append((self._clock(), text, values))

    def watch_total(self, generated: int) -> None:
        """Totals go on over restarts: Prometheus takes a fall for a reset."""
        if generated < self._generated:
            self.violation(f"generated tokens fell from {self._generated} to {generated}")
        self._generated = generated

    def violation(self, text: str) -> None:
        self.note("VIOLATION %s", text)
        self.violations.append(text)

    def lines(self) -> list[str]:
        return [f"{time:9.4f}  {text % values}" for time, text, values in self._lines]
