"""What has been received of one request: all that another engine process needs to go on with it."""

from __future__ import annotations

from engine.messages import Attended, Progress, RequestUpdate, Timing


class Received:
    """Accumulates updates over the engine processes that worked on a request, one after another."""

    def __init__(self) -> None:
        self.output: list[int] = []  # all generated tokens, in order
        self._prefilled = 0  # prompt tokens computed, by the engine that got furthest
        self._cached: int | None = None
        self._prompt_logprobs = 0
        self._timing = Timing()
        self._attended = Attended()

    def take(self, update: RequestUpdate) -> bool:
        """Account an update; says whether the request has got further than ever before.

        A prompt that is computed again after a restart gets no further until it passes the point
        where the engine before was lost.
        """
        ended = update.finish_reason is not None
        further = bool(update.tokens) or update.prefilled > self._prefilled or ended
        self.output.extend(update.tokens)
        self._prompt_logprobs += len(update.prompt_logprobs)
        self._prefilled = max(self._prefilled, update.prefilled)
        if self._cached is None and update.prefilled:
            self._cached = update.cached
        self._timing = update.timing or self._timing
        self._attended = update.attended or self._attended
        return further

    def progress(self) -> Progress:
        """What the next engine must neither tell again nor count again."""
        return Progress(self._prompt_logprobs, self._cached, self._timing, self._attended)
