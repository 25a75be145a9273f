"""The engine as the front end sees it: a child process that is watched and started again.

States:

    loading -> ready -> restarting -> ready ...   a crash or a hang; live requests fail
                  \\-> draining                    no new work, the live ones end
    any     -> dead                               the first load failed, the restart budget is
                                                  spent, or `stop` was called
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from engine.admission import AdmissionQueue
from engine.child import EngineChild
from engine.child_protocol import Child, ChildEndedError, LaunchChild
from engine.client import EngineState, Generation
from engine.config import EngineConfig
from engine.errors import EngineError, EngineUnavailableError, RequestError
from engine.messages import Abort, Add, EngineInfo, Report, Stats
from engine.request import SamplingParams
from engine.supervision import RestartBudget, SupervisionPolicy

logger = logging.getLogger(__name__)

_COUNTERS = (
    *("step", "preemptions", "prefix_hit_tokens", "prompt_tokens", "generated_tokens"),
    *("decode_steps", "decode_seconds", "prefill_steps", "prefill_seconds"),
    *("mixed_steps", "mixed_seconds", "memory_retries", "attended_tokens", "context_tokens"),
    *("read_selected_bytes", "read_whole_bytes", "read_window_bytes"),
    *("read_index_bytes", "read_dense_bytes"),
)


class EngineProcess:
    """Implements `engine.client.Engine` with a child process. All methods run on one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_queued_requests: int = 256,
        policy: SupervisionPolicy | None = None,
        launch: LaunchChild = EngineChild.launch,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """
        Args:
            config: sent to the child as it is.
            max_queued_requests: requests that may wait for their first computation.
            policy: deadlines and restart limits.
            launch: starts the child; a simulation gives one without a process.
            clock: monotonic seconds, the same clock as in the child.
            sleep: waits for seconds of that clock.
        """
        self._config = config
        self._policy = policy if policy is not None else SupervisionPolicy()
        self._launch_child = launch
        self._clock = clock
        self._sleep = sleep
        self._budget = RestartBudget(self._policy, clock)
        self._queue = AdmissionQueue(max_queued_requests, clock)
        self._live: dict[int, Generation] = {}
        self._ids = itertools.count(1)
        self._phase: EngineState = "loading"
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._child: Child | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._info: EngineInfo | None = None
        self._stats = Stats()
        self._stats_before = Stats()  # counters of the engine processes that ended
        self._restarts = 0
        self._last_sign = clock()

    @property
    def state(self) -> EngineState:
        return "draining" if self._draining and self._phase != "dead" else self._phase

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model; raises EngineUnavailableError before the first ready."""
        if self._info is None:
            raise EngineUnavailableError("the model is not loaded yet")
        return self._info

    @property
    def stats(self) -> Stats:
        """The newest snapshot; counters go on over restarts."""
        return self._stats

    @property
    def restarts(self) -> int:
        return self._restarts

    @property
    def pid(self) -> int | None:
        """The engine's process id, None while there is none."""
        return None if self._child is None else self._child.pid

    def seconds_since_step(self) -> float:
        """Age of the last sign of life; the loop also gives one while idle."""
        return self._clock() - self._last_sign

    async def start(self) -> None:
        """Load the model and return when ready.

        Raises:
            EngineError: one line; CheckpointError or ConfigError where it is one.
        """
        assert self._supervisor is None, "start is called once"
        try:
            child = await self._launch()
        except BaseException:
            self._phase = "dead"
            raise
        self._supervisor = asyncio.create_task(self._supervise(child), name="engine-supervisor")

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, deadline: float | None = None
    ) -> Generation:
        """Admit a request; the engine drops it at `deadline`, by the clock that it was given.

        Raises:
            QueueFullError: too much is queued.
            EngineUnavailableError: loading, restarting, draining or dead.
            RequestError: a token id does not fit 32 bits.
        """
        if self.state != "ready" or self._child is None:
            raise EngineUnavailableError(f"the engine is {self.state}")
        self._queue.check()
        request_id = next(self._ids)
        add = Add(
            request_id=request_id,
            params=params,
            prompt=_int32_buffer(prompt),
            arrival=self._clock(),
            deadline=deadline,
        )
        generation = Generation(request_id, prompt, params, self._abort, deadline)
        self._child.send(add)
        self._live[request_id] = generation
        self._queue.enter(request_id)
        self._idle.clear()
        return generation

    async def drain(self, seconds: float) -> None:
        """Take no new work; wait until live requests end, at most `seconds`."""
        self._draining = True
        tasks = {
            asyncio.ensure_future(self._idle.wait()),
            asyncio.ensure_future(self._sleep(seconds)),
        }
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def stop(self) -> None:
        """End the engine process; live requests fail. Harmless when called again."""
        self._phase = "dead"
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        if self._child is not None:
            await self._child.shut_down(self._policy.stop_seconds)
        await self._drop_child()
        self._fail_live("the engine was stopped")

    async def _launch(self) -> Child:
        """A child that is ready; it is cleaned up if it does not get that far."""
        child = self._child = await self._launch_child(self._config)
        try:
            self._info = await child.wait_ready(self._policy.load_seconds)
        except BaseException:
            await self._drop_child()
            raise
        self._last_sign = self._clock()
        self._phase = "ready"
        logger.info("engine process %d is ready", child.pid)
        return child

    async def _supervise(self, child: Child | None) -> None:
        """Listen to the engine; whenever it is lost, clean up and start another."""
        try:
            while child is not None:
                await self._listen(child)
                child = await self._restart()
            logger.error("engine is dead: the restart budget is spent")
        except Exception:
            logger.exception("the supervisor of the engine failed")
        self._phase = "dead"
        self._fail_live("the engine is dead")
        await self._drop_child()

    async def _listen(self, child: Child) -> None:
        """Dispatch reports until the child is lost."""
        while True:
            try:
                message = await child.receive(self._policy.silence_seconds)
            except ChildEndedError as error:
                logger.error("%s", error)
                return
            if not isinstance(message, Report):
                logger.error("engine sent %s while running", type(message).__name__)
                return
            self._dispatch(message)

    def _dispatch(self, report: Report) -> None:
        self._last_sign = self._clock()
        self._stats = _add_counters(report.stats, self._stats_before)
        for update in report.updates:
            self._queue.depart(update.request_id)
            generation = self._live.get(update.request_id)
            if generation is None:
                continue  # aborted while the report was under way
            generation.push(update)
            if update.finish_reason is not None:
                self._forget(update.request_id)

    async def _restart(self) -> Child | None:
        """Another child that is ready, or None when the budget is spent."""
        self._phase = "restarting"
        self._fail_live("the engine failed and is restarting")
        await self._drop_child()
        self._stats_before = self._stats
        self._stats = _add_counters(Stats(), self._stats_before)
        while (delay := self._budget.spend()) is not None:
            await self._sleep(delay)
            self._restarts += 1
            try:
                return await self._launch()
            except EngineError as error:
                logger.error("engine did not start: %s", error)
        return None

    async def _drop_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.close()

    def _abort(self, request_id: int) -> None:
        if request_id in self._live:
            self._forget(request_id)
            if self._child is not None:
                self._child.send(Abort([request_id]))

    def _forget(self, request_id: int) -> None:
        del self._live[request_id]
        self._queue.leave(request_id)
        if not self._live:
            self._idle.set()

    def _fail_live(self, message: str) -> None:
        for generation in self._live.values():
            generation.fail(EngineUnavailableError(message))
        self._live.clear()
        self._queue.clear()
        self._idle.set()


def _int32_buffer(tokens: Sequence[int]) -> bytes:
    try:
        return array("i", tokens).tobytes()
    except OverflowError as error:
        raise RequestError("a token id does not fit 32 bits") from error


def _add_counters(now: Stats, before: Stats) -> Stats:
    """`now` with the counters of earlier processes added, so that no total ever falls."""
    totals = {name: getattr(now, name) + getattr(before, name) for name in _COUNTERS}
    return msgspec.structs.replace(now, **totals)
