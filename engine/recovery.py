"""What engine failures cost, for metrics, over the life of the front end."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Recovery:
    """Counters. An outage lasts from the loss of an engine to the next one's first report."""

    resumed: int = 0  # requests given to another engine process; one counts for each restart
    poisoned: int = 0  # requests that failed because they alone ended the engine
    outages: int = 0  # that are over
    outage_seconds: float = 0.0  # their sum, of a monotonic clock
    last_outage_seconds: float = 0.0
    features_off: int = 0  # of the engine that runs (`engine.fallback`); 0 is all on
    _since: float | None = field(default=None, repr=False)

    def lose(self, now: float) -> None:
        """An engine is lost; a second one before the next report is part of the same outage."""
        if self._since is None:
            self._since = now

    def report(self, now: float) -> None:
        """An engine reports; harmless where nothing was lost."""
        if self._since is not None:
            self.last_outage_seconds = now - self._since
            self.outage_seconds += self.last_outage_seconds
            self.outages += 1
            self._since = None
