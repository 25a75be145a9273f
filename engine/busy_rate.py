"""How fast something is worked off while there is something to work off."""

from __future__ import annotations

_HALF_LIFE = 60.0  # busy seconds after which a measurement counts half
_FEWEST = 2  # pieces of work that make a rate


class BusyRate:
    """Work done per busy second, recent seconds first. An idle hour says nothing and is left out.

    Clockless: whoever measures tells the time, in seconds that never go back.
    """

    def __init__(self) -> None:
        self._work = 0.0
        self._seconds = 0.0
        self._pieces = 0
        self._busy_since: float | None = None  # until when busy time has been counted

    def advance(self, now: float, *, busy: bool) -> None:
        """Count the time since the last call, if it was busy; `busy` tells how it goes on."""
        if self._busy_since is not None:
            elapsed = now - self._busy_since
            kept = 0.5 ** (elapsed / _HALF_LIFE)
            self._work *= kept
            self._seconds = self._seconds * kept + elapsed
        self._busy_since = now if busy else None

    def add(self, work: float) -> None:
        """Work that is done by now; the caller has advanced."""
        self._work += work
        self._pieces += 1

    def seconds_for(self, work: float) -> float | None:
        """How long so much work takes; None while no rate is known."""
        if self._pieces < _FEWEST or self._work <= 0:
            return None
        return work * self._seconds / self._work
