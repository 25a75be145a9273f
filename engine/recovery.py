"""What engine failures cost: counters for metrics, over the life of the front end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recovery:
    """A snapshot. Seconds are of a monotonic clock."""

    resumed: int = 0  # requests given to another engine process; one counts for each restart
    poisoned: int = 0  # requests that failed because they alone ended the engine
    outages: int = 0  # that are over: from the loss of an engine to the next one's first report
    outage_seconds: float = 0.0  # their sum
    last_outage_seconds: float = 0.0


class Outages:
    """Times from the loss of an engine to the first report of the next one that works."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self.last_seconds = 0.0
        self._since: float | None = None

    def begin(self, now: float) -> None:
        """An engine is lost; a second loss before the next report is part of the same outage."""
        if self._since is None:
            self._since = now

    def end(self, now: float) -> None:
        """An engine reports; harmless where nothing was lost."""
        if self._since is not None:
            self.last_seconds = now - self._since
            self.seconds += self.last_seconds
            self.count += 1
            self._since = None
