"""How much a step may hold after steps for which there was no memory."""

from __future__ import annotations

from collections.abc import Sequence

from engine.batch import Batch
from engine.request import Request

_FIRST_PATIENCE = 16  # steps that go well before more is tried
_TRIES = 3  # of the smallest step, since another process may have taken the memory for a moment
_MOST_PATIENCE = 1024  # the same where it went wrong again and again


class StepLimits:
    """Halves what a step holds whenever one fails, and doubles it after steps that went well.

    Of chunks the tokens are halved, down to one block; then rows and chunks go apart, one chunk a
    step; of rows the number is halved. What fails all alone, again and again, is at fault.
    """

    def __init__(self, max_batch_tokens: int, block_tokens: int) -> None:
        self._max_tokens = max_batch_tokens
        self._block = min(block_tokens, max_batch_tokens)
        self._tokens = max_batch_tokens  # of all chunks in a step
        self._rows = max_batch_tokens
        self.apart = False  # rows and chunks in steps of their own, chunks one by one
        self._patience = _FIRST_PATIENCE
        self._good = 0
        self._alone = 0  # failures in a row of steps that were as small as can be

    @property
    def active(self) -> bool:
        return self.apart or min(self._tokens, self._rows) < self._max_tokens

    def shrink(self, batch: Batch) -> int | None:
        """There was no memory for this step.

        Returns:
            The request at fault if the step cannot be made smaller.
        """
        self._patience = min(2 * self._patience, _MOST_PATIENCE) if self.active else _FIRST_PATIENCE
        self._good = 0
        chunks = [span for span in batch.spans if not span.is_row]
        tokens = sum(len(span.tokens) for span in chunks)
        if len(batch.spans) == 1 and tokens <= self._block:
            self._alone += 1
            return batch.spans[0].request_id if self._alone >= _TRIES else None
        self._alone = 0
        if tokens > self._block:
            self._tokens = max(tokens // 2 // self._block * self._block, self._block)
        elif chunks:
            self._tokens, self.apart = self._block, True
        else:
            self._rows = len(batch.spans) // 2
        return None

    def went_well(self) -> None:
        """A step was computed; after enough of them the next ones may hold more."""
        self._alone = 0
        self._good += self.active
        if self._good < self._patience:
            return
        self._good = 0
        if self.apart:
            self.apart = False
        else:
            self._tokens = min(2 * self._tokens, self._max_tokens)
            self._rows = min(2 * self._rows, self._max_tokens)

    def chunk_tokens(self, budget: int) -> int:
        """How many of `budget` tokens chunks may take."""
        return min(budget, self._tokens)

    def rows(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Those that may get their token in this step, the ones that waited longest first."""
        if len(requests) <= self._rows:
            return requests
        return sorted(requests, key=lambda request: request.last_step)[: self._rows]
