"""How many bytes of request bodies the calls in flight may hold together."""

from __future__ import annotations

from engine.errors import QueueFullError
from server.large_body import SMALL_BODY

_RETRY_SECONDS = 5  # a body is held as long as its call runs, which nobody foresees


class BodyBudget:
    """Counts them from their receipt to the end of their calls, which keep what they were asked.

    A body that finds no other held, or that is small, is taken in any case: neither the largest one
    that is allowed nor a short question beside large ones must be locked out for good. Small ones
    are bounded by the number of connections.
    """

    def __init__(self, limit: int) -> None:
        self.held = 0  # bytes
        self._limit = limit

    def take(self, size: int, received: int) -> None:
        """Hold `size` bytes more of a body of which `received` are held.

        Raises:
            QueueFullError: they are too many; none of them is held.
        """
        alone = self.held == received
        if not alone and received + size > SMALL_BODY and self.held + size > self._limit:
            raise QueueFullError(f"{self.held} bytes of bodies are held", _RETRY_SECONDS)
        self.held += size

    def give_back(self, received: int) -> None:
        """A call ended."""
        self.held -= received
        assert self.held >= 0, "more was given back than taken"
