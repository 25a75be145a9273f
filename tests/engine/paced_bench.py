"""A scheduler on a simulated clock: steps take what a known law says, and waits are recorded."""

from __future__ import annotations

import random
from dataclasses import dataclass

from engine.kv_pools import KvPools
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from engine.step_time import StepLoad

BLOCK = 64


@dataclass(frozen=True, slots=True)
class CostLaw:
    """Seconds of a step; by default those of a large model on one fast GPU."""

    step: float = 0.005
    with_chunk: float = 0.010
    row: float = 2e-5
    row_context: float = 2e-9
    token: float = 3e-5
    pair: float = 1e-10

    def __call__(self, load: StepLoad) -> float:
        fixed = self.step + self.with_chunk * (load.tokens > 0)
        rows = self.row * load.rows + self.row_context * load.row_context
        return fixed + rows + self.token * load.tokens + self.pair * load.pairs

    def chunk(self, start: int, count: int) -> float:
        """What a chunk adds to a step of chunks."""
        return self.token * count + self.pair * count * (start + (count + 1) / 2)


@dataclass(slots=True)
class Served:
    """One request and when its tokens came, in simulated seconds."""

    request: Request
    arrival: float
    times: list[float]

    @property
    def first_token(self) -> float:
        """Seconds from arrival."""
        return self.times[0] - self.arrival

    def gaps(self, since: float = 0.0) -> list[float]:
        """Seconds between tokens, of those that came after `since`."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [later - earlier for earlier, later in pairs if earlier >= since]


class PacedBench:
    """Adds requests and runs steps; every request samples the same token until `max_tokens`."""

    def __init__(
        self,
        max_step_seconds: float | None,
        *,
        law: CostLaw | None = None,
        noise: float = 0.0,
        seed: int = 1,
        full_pages: int = 20_000,
        max_num_seqs: int = 32,
        max_batch_tokens: int = 2048,
    ) -> None:
        pools = KvPools(
            full_pages=full_pages, window_pages=0, block_tokens=BLOCK, prefix_caching=False
        )
        self.scheduler = Scheduler(
            pools,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            max_step_seconds=max_step_seconds,
        )
        self.law = law or CostLaw()
        self.now = 0.0
        self.steps: list[float] = []  # seconds
        self.live: dict[int, Served] = {}
        self._noise = noise
        self._random = random.Random(seed)
        self._next_id = 0

    def add(self, prompt_tokens: int, max_tokens: int = 1) -> Served:
        request = Request(
            self._next_id, [self._next_id] * prompt_tokens, SamplingParams(max_tokens=max_tokens)
        )
        self._next_id += 1
        self.scheduler.add(request)
        served = self.live[request.request_id] = Served(request, self.now, [])
        return served

    def step(self) -> None:
        batch = self.scheduler.schedule()
        assert batch.spans
        seconds = self.law(StepLoad.of(batch.spans))
        seconds *= 1 + self._noise * self._random.uniform(-1, 1)
        self.now += seconds
        self.steps.append(seconds)
        self.scheduler.learn(batch, seconds)
        self.scheduler.update(batch, {s.request_id: 1 for s in batch.spans if s.sample})
        for span in batch.spans:
            served = self.live[span.request_id]
            if span.sample:
                served.times.append(self.now)
            if len(served.request.output) >= served.request.params.max_tokens:
                self.scheduler.finish(span.request_id)
                del self.live[span.request_id]

    def until(self, served: Served, tokens: int = 1, limit: int = 100_000) -> None:
        """Step until a request has so many tokens."""
        for _ in range(limit):
            if len(served.times) >= tokens:
                return
            self.step()
        raise AssertionError(f"{len(served.times)} tokens after {limit} steps")
