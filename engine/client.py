"""How the front end talks to an engine: submit a request, read its updates, look at its state.

`Engine` is the border that the HTTP layer is written against; `engine.process.EngineProcess`
implements it with a child process, tests implement it in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from engine.errors import EngineError
from engine.messages import EngineInfo, RequestUpdate, Stats
from engine.received import Received
from engine.recovery import Recovery
from engine.request import SamplingParams

EngineState = Literal["loading", "ready", "restarting", "draining", "dead"]


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to generate."""

    prompt: Sequence[int]  # never changed afterwards; jobs of one prompt may hold the same object
    params: SamplingParams
    deadline: float | None = None  # time.monotonic() seconds, when the engine drops it


class Generation:
    """One live request, read by one task of the event loop.

    Updates that arrive faster than they are read are merged into one, so a slow reader costs the
    memory of its own answer and nothing more. It lives on when the engine process is lost: what
    was received stays, and the next process goes on from there.
    """

    def __init__(
        self,
        request_id: int,
        prompt: Sequence[int],
        params: SamplingParams,
        abort: Callable[[int], None],
        deadline: float | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.deadline = deadline  # time.monotonic() seconds
        self.resumes = 0  # how many times it went on in another engine process
        self.received = Received()
        self._abort = abort
        self._pending: RequestUpdate | None = None
        self._error: EngineError | None = None
        self._finished = False
        self._wakeup = asyncio.Event()

    @property
    def output(self) -> list[int]:
        """All tokens received."""
        return self.received.output

    @property
    def finished(self) -> bool:
        """Whether the engine has nothing more to say about this request."""
        return self._finished

    @property
    def unread(self) -> RequestUpdate | None:
        """What came since the last call of `take`."""
        return self._pending

    def push(self, update: RequestUpdate) -> bool:
        """Called by the engine client, on the event loop, for every update.

        Returns whether the request has got further than ever before.
        """
        further = self.received.take(update)
        self._finished = self._finished or update.finish_reason is not None
        self._pending = update if self._pending is None else _merge(self._pending, update)
        self._wakeup.set()
        return further

    def fail(self, error: EngineError) -> None:
        """End the request with an error that `next_update` raises once pending updates are read."""
        self._finished = True
        self._error = error
        self._wakeup.set()

    def listen(self, wakeup: asyncio.Event) -> None:
        """Let updates set `wakeup`, so that one task can wait for several generations."""
        if self._pending is not None or self._error is not None:
            wakeup.set()
        self._wakeup = wakeup

    def take(self) -> RequestUpdate | None:
        """Everything since the last call, None if nothing came.

        Raises:
            EngineError: the request was failed by the client, for example on engine death.
        """
        if self._pending is not None:
            update, self._pending = self._pending, None
            return update
        if self._error is not None:
            raise self._error
        return None

    async def next_update(self, timeout: float | None = None) -> RequestUpdate | None:
        """Everything since the last call; None if nothing came within `timeout` seconds.

        Raises:
            EngineError: the request was failed by the client, for example on engine death.
        """
        if self._pending is None and self._error is None:
            self._wakeup.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._wakeup.wait()
            except TimeoutError:
                return None
        return self.take()

    def abort(self) -> None:
        """Stop computing and free the pages; harmless on a finished request."""
        if not self._finished:
            self._finished = True
            self._abort(self.request_id)


class Engine(Protocol):
    """A source of generations. All methods are called on the event loop."""

    @property
    def state(self) -> EngineState: ...

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model; raises EngineUnavailableError before the first ready."""
        ...

    @property
    def stats(self) -> Stats:
        """The newest snapshot."""
        ...

    @property
    def restarts(self) -> int:
        """Engine processes started again, those included that did not get ready."""
        ...

    @property
    def pid(self) -> int | None:
        """The engine's process, None while there is none."""
        ...

    @property
    def recovery(self) -> Recovery:
        """What the failures of engine processes have cost."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why there is no engine although it was started again, in words that anyone may read."""
        ...

    def seconds_since_step(self) -> float:
        """Age of the last sign of life of the engine loop, which also reports while idle."""
        ...

    def step_seconds(self) -> float:
        """How much longer than an ordinary one the step under way may take; 0 between steps."""
        ...

    def submit_all(self, jobs: Sequence[Job]) -> list[Generation]:
        """Admit the jobs of one call, all of them or none.

        Raises:
            QueueFullError: too much is queued.
            EngineUnavailableError: loading, restarting, draining or dead.
            RequestError: it can not be computed; PoisonError where it ended the engine before.
        """
        ...

    def hold(self, requests: int, prefill_tokens: int) -> AbstractContextManager[None]:
        """Count a call as queued while it is tokenised, by the fewest tokens that it can have.

        Raises:
            QueueFullError: too much is queued; no need to tokenise.
        """
        ...

    async def start(self) -> None:
        """Load the model and return when ready; raises EngineError with one line otherwise."""
        ...

    async def drain(self, seconds: float) -> None:
        """Take no new work; wait until live requests end, at most `seconds`."""
        ...

    async def stop(self) -> None:
        """End the engine process; no orphan stays."""
        ...


def _merge(first: RequestUpdate, second: RequestUpdate) -> RequestUpdate:
    return RequestUpdate(
        request_id=first.request_id,
        tokens=first.tokens + second.tokens,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        prefilled=max(first.prefilled, second.prefilled),
        cached=max(first.cached, second.cached),
        finish_reason=second.finish_reason,
        stop_token=second.stop_token,
        timing=second.timing if second.timing is not None else first.timing,
        attended=second.attended if second.attended is not None else first.attended,
    )
