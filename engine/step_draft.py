"""The step that is being put together: what is in it already, and what it may still hold."""

from __future__ import annotations

from engine.batch import Batch, Span
from engine.kv_pools import KvPools
from engine.request import Request


class StepDraft:
    """Takes positions of requests as long as there is budget, and the pages that they need.

    Pages that a request got stay its own, whether or not the step is computed in the end.
    """

    def __init__(self, budget: int, pools: KvPools) -> None:
        """`budget`: tokens that the step may hold."""
        self.budget = budget  # what is left; whoever puts the step together may lower it
        self.spans: dict[int, Span] = {}  # by request id
        self._pools = pools

    @property
    def is_empty(self) -> bool:
        return not self.spans

    def add(self, request: Request, tokens: int) -> bool:
        """Compute the next positions of a request that has a slot, all of one rule.

        Args:
            tokens: how many at most; budget and pages may allow less.

        Returns:
            False if there is no page for even one; nothing is taken then.
        """
        start = request.computed
        limit = request.prompt_len if request.is_prefill else request.total
        reachable = self._pools.reachable(request)
        if reachable <= start:
            return False
        stop = min(start + min(tokens, self.budget), limit, reachable)
        if stop > start:
            self._pools.grow(request, stop)
            self.budget -= stop - start
            self.spans[request.request_id] = _span(request, stop)
        return True

    def drop(self, request_id: int) -> None:
        """Leave a request out after all: others may have what it took of the budget."""
        span = self.spans.pop(request_id, None)
        if span is not None:
            self.budget += len(span.tokens)

    def batch(self) -> Batch:
        """The step as it is now."""
        decodes = [span for span in self.spans.values() if span.rule == "decode"]
        prefills = [span for span in self.spans.values() if span.rule == "prefill"]
        return Batch(decodes + prefills)


def _span(request: Request, stop: int) -> Span:
    """Positions [computed, stop) of a request that has pages for them."""
    start = request.computed
    assert request.slot is not None
    return Span(
        request_id=request.request_id,
        slot=request.slot,
        start=start,
        tokens=request.tokens(start, stop),
        rule="prefill" if start < request.prompt_len else "decode",
        full_blocks=request.full_blocks,
        window_blocks=request.window_blocks,
        sample=stop == request.total and request.params.max_tokens > 0,
        epoch=request.preemptions,
    )
