"""A scheduler with everything it needs and a worker that samples the same token for ever."""

from __future__ import annotations

from typing import Any

from engine.batch import Batch
from engine.kv_pools import KvPools
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler

BLOCK = 4  # tokens per page


class SchedulerBench:
    """Adds requests, runs steps and ends requests at their `max_tokens`."""

    def __init__(
        self,
        *,
        full_pages: int = 100,
        window_pages: int = 0,
        window_tokens: int = 0,
        sink_tokens: int = 0,
        max_num_seqs: int = 8,
        max_batch_tokens: int = 16,
        **options: Any,
    ) -> None:
        self.pools = KvPools(
            full_pages=full_pages,
            window_pages=window_pages,
            block_tokens=BLOCK,
            window_tokens=window_tokens,
            sink_tokens=sink_tokens,
            **options,
        )
        self.scheduler = Scheduler(
            self.pools, max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens
        )
        self.live: dict[int, Request] = {}
        self.next_id = 0

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 8,
        output: list[int] | None = None,
        prompt_logprobs: int | None = None,
    ) -> Request:
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        request = Request(self.next_id, prompt, params, output=output)
        self.next_id += 1
        self.scheduler.add(request)
        self.live[request.request_id] = request
        return request

    def step(self, token: int = 1) -> dict[int, int]:
        """One step; how many tokens it computed for each request id."""
        batch = self.batch(token)
        return {span.request_id: len(span.tokens) for span in batch.spans}

    def batch(self, token: int = 1) -> Batch:
        batch = self.scheduler.schedule()
        self.scheduler.update(batch, {s.request_id: token for s in batch.spans if s.sample})
        for span in batch.spans:
            request = self.live[span.request_id]
            if not request.is_prefill and len(request.output) >= request.params.max_tokens:
                self.scheduler.finish(span.request_id)
                del self.live[span.request_id]
        self.scheduler.check_integrity()
        return batch

    def abort(self, request: Request) -> None:
        self.scheduler.finish(request.request_id)
        del self.live[request.request_id]

    def run(self, steps: int = 1000) -> int:
        """Step until all requests ended; how many steps that took."""
        for count in range(steps):
            if not self.live:
                return count
            self.batch()
        raise AssertionError(f"{len(self.live)} requests did not end in {steps} steps")


def distinct(length: int, start: int = 1000) -> list[int]:
    """Token ids that no other start shares."""
    return list(range(start, start + length))
