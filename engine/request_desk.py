"""Where requests come in and leave, while the engine processes behind come and go.

A call is admitted whole or not at all: nothing of it ended the engine before, and the queue has
room. Its requests are live from then on. A live request outlasts the engine process: the next one
gets its prompt, the tokens received so far and what was told of it, and goes on
(`engine.live_requests`). Which requests it gets first, and when one of them is failed because it
ends every engine, is decided in `engine.replay_order`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from array import array
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager

from engine.admission import AdmissionQueue, prefill_charges
from engine.client import Generation, Job
from engine.errors import EngineUnavailableError, PoisonError, RequestError
from engine.live_requests import LiveRequests
from engine.messages import Abort, Add, EngineInfo, RequestUpdate
from engine.poison import PoisonList
from engine.running_child import RunningChild

logger = logging.getLogger(__name__)


class RequestDesk:
    """Sees each request from its admission to its end. All methods run on one event loop."""

    def __init__(
        self,
        queue: AdmissionQueue,
        live: LiveRequests,
        poison: PoisonList,
        child: RunningChild,
        clock: Callable[[], float],
        *,
        prefix_caching: bool,
    ) -> None:
        """
        Args:
            queue: bounds what waits.
            live: keeps what a request needs to go on.
            poison: requests that are refused.
            child: gets the requests.
            clock: monotonic seconds, the same clock as in the child.
            prefix_caching: whether equal prompts of a call are computed once.
        """
        self._queue = queue
        self._live = live
        self._poison = poison
        self._child = child
        self._clock = clock
        self._prefix_caching = prefix_caching
        self._block_tokens: int | None = None  # per page that can be shared; None: none is
        self._ids = itertools.count(1)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def most_crashes(self) -> int:
        """Of all live requests: engines that one ended in a row without getting further."""
        return self._live.most_crashes

    def know_model(self, info: EngineInfo) -> None:
        """An engine is ready: what follows from its model for the queue."""
        self._queue.know_longest(info.max_model_len)
        self._block_tokens = info.block_tokens if self._prefix_caching else None

    def submit_all(self, jobs: Sequence[Job]) -> list[Generation]:
        """Admit the jobs of one call, all of them or none.

        Raises:
            QueueFullError: too much is queued.
            RequestError: a token id does not fit 32 bits; PoisonError where the same request ended
                the engine before.
        """
        distinct = {id(job.prompt): job.prompt for job in jobs}
        buffers = {key: _int32_buffer(prompt) for key, prompt in distinct.items()}
        prompts = [buffers[id(job.prompt)] for job in jobs]
        if any(map(self._poison.holds, prompts, (job.params for job in jobs))):
            raise PoisonError("the same request ended the engine before")
        shares = all(job.params.prompt_logprobs is None for job in jobs)
        charges = prefill_charges(prompts, self._block_tokens if shares else None)
        self._queue.check(len(jobs), sum(charges))
        return [self._begin(*one) for one in zip(jobs, prompts, charges, strict=True)]

    def hold(self, requests: int, prefill_tokens: int) -> AbstractContextManager[None]:
        """Count a call as queued while it is tokenised; raises QueueFullError on entry."""
        return self._queue.hold(requests, prefill_tokens)

    def take(self, update: RequestUpdate) -> None:
        """News of a request from the engine; of one that is gone it is dropped."""
        self._queue.progress(update.request_id, update.prefilled, update.cached)
        self._child.send(self._live.push(update))
        if update.finish_reason is not None:
            self._forget(update.request_id)

    def lose_engine(self, in_step: Collection[int] | None) -> int:
        """The engine is lost while it computed `in_step` (None: between steps); all waits again.

        Returns:
            How many engines were lost to the request that is guilty, and is failed; 0: none is.
        """
        self._queue.restart()
        guilty = self._live.lose_engine(in_step)
        if guilty is None:
            return 0
        self._condemn(*guilty)
        return guilty[1]

    def resume(self) -> int:
        """Give the new engine what the one before was lost with; how many requests that is."""
        if self._live:
            logger.info("%d requests go on in engine process %s", len(self._live), self._child.pid)
        self._child.send(self._live.resume())
        return len(self._live)

    def fail_all(self, message: str) -> None:
        """End all live requests: there is no engine for them any more."""
        self._live.fail_all(EngineUnavailableError(message))
        self._queue.clear()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no request is live."""
        await self._idle.wait()

    def _begin(self, job: Job, prompt: bytes, charge: int) -> Generation:
        """Hand an admitted job to the engine."""
        request_id = next(self._ids)
        generation = Generation(request_id, job.prompt, job.params, self._abort, job.deadline)
        add = Add(
            request_id=request_id,
            params=job.params,
            prompt=prompt,
            arrival=self._clock(),
            deadline=job.deadline,
        )
        self._queue.enter(request_id, len(job.prompt), charge)
        self._child.send(self._live.add(generation, add))
        self._idle.clear()
        return generation

    def _condemn(self, generation: Generation, crashes: int) -> None:
        """Fail a request that alone ended the engine again and again, and refuse its like."""
        request_id = generation.request_id
        logger.error("request %d ended the engine %d times and is failed", request_id, crashes)
        self._poison.add(_int32_buffer(generation.prompt), generation.params)
        generation.push(RequestUpdate(request_id=request_id, finish_reason="error"))
        self._forget(request_id)

    def _abort(self, request_id: int) -> None:
        if request_id in self._live:
            self._child.send([Abort([request_id])])
            self._child.send(self._live.remove(request_id))
            self._forget(request_id)

    def _forget(self, request_id: int) -> None:
        """A request is no longer live."""
        self._queue.leave(request_id)
        if not self._live:
            self._idle.set()


def _int32_buffer(tokens: Sequence[int]) -> bytes:
    try:
        return array("i", tokens).tobytes()
    except OverflowError as error:
        raise RequestError("a token id does not fit 32 bits") from error
