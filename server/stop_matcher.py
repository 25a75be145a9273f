"""Stop strings over a stream of text: found wherever the pieces break, never sent in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Holds back text that could be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "the edge refuses empty stop strings"
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Text that is safe to send. After a match: what stood before it, then always nothing.

        The match that is complete first wins, so the result does not depend on how the text is
        cut; of those that end together, the one that begins first.
        """
        if self.matched or not text:
            return ""
        if not self._stops:
            return text
        buffer = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if found:
            self.matched = True
            self._held = ""
            _, start = min(found)
            return buffer[:start]
        keep = max(_overlap(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """What is still held back when generation has ended without a match."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
