"""The engine as the front end sees it: a child process that is watched and started again.

States:

    loading -> ready -> restarting -> ready ...   a crash or a hang; live requests wait
                  \\-> draining                    no new work, the live ones end
    any     -> dead                               the first load failed, the restart budget is
                                                  spent, or `stop` was called

Requests come in and leave at the desk (`engine.request_desk`), and outlast the engine process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager

from engine.admission import AdmissionQueue
from engine.child import EngineChild
from engine.child_protocol import ChildEndedError, LaunchChild
from engine.client import EngineState, Generation, Job
from engine.config import EngineConfig
from engine.errors import EngineError, EngineUnavailableError
from engine.fallback import features_off
from engine.live_requests import LiveRequests
from engine.messages import EngineInfo, Report, Stats
from engine.poison import PoisonList
from engine.recovery import Recovery
from engine.request_desk import RequestDesk
from engine.running_child import RunningChild
from engine.starter import ReadyChild, Starter
from engine.stats_total import StatsTotal
from engine.supervision import SupervisionPolicy

logger = logging.getLogger(__name__)


class EngineProcess:
    """Implements `engine.client.Engine` with a child process. All methods run on one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_queued_requests: int = 256,
        max_queued_prefill_tokens: int | None = None,
        policy: SupervisionPolicy | None = None,
        launch: LaunchChild = EngineChild.launch,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """
        Args:
            config: sent to the child as it is.
            max_queued_requests: requests that may wait for their first computation.
            max_queued_prefill_tokens: prompt tokens that may wait to be computed; None follows
                the longest prompt (`engine.admission.default_prefill_limit`).
            policy: deadlines and restart limits.
            launch: starts the child; a simulation gives one without a process.
            clock: monotonic seconds, the same clock as in the child.
            sleep: waits for seconds of that clock.
        """
        self._policy = policy = policy if policy is not None else SupervisionPolicy()
        self._clock = clock
        self._sleep = sleep
        self._starter = Starter(config, policy, launch, clock, sleep)
        self._child = RunningChild(policy, clock)
        queue = AdmissionQueue(
            clock,
            max_requests=max_queued_requests,
            max_prefill_tokens=max_queued_prefill_tokens,
            small_tokens=config.max_batch_tokens,
        )
        self._desk = RequestDesk(
            queue,
            LiveRequests(policy.max_resumes),
            PoisonList(policy.poison_seconds, clock),
            self._child,
            clock,
            prefix_caching=config.prefix_caching,
        )
        self._phase: EngineState = "loading"
        self._draining = False
        self._supervisor: asyncio.Task[None] | None = None
        self._info: EngineInfo | None = None
        self._stats = StatsTotal()
        self._recovery = Recovery()
        self._last_sign = clock()
        self._cause_of_death = ""
        self._died = asyncio.Event()

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
        return self._stats.newest

    @property
    def restarts(self) -> int:
        return self._starter.restarts

    @property
    def recovery(self) -> Recovery:
        return self._recovery

    @property
    def trouble(self) -> str | None:
        """Why there is no engine although it was started again, in words that anyone may read."""
        return self._starter.trouble

    @property
    def pid(self) -> int | None:
        """The engine's process id, None while there is none."""
        return self._child.pid

    def seconds_since_step(self) -> float:
        """Age of the last sign of life; the loop also gives one while idle."""
        return self._clock() - self._last_sign

    def step_seconds(self) -> float:
        """How much longer than an ordinary one the step under way may take; 0 between steps."""
        return self._child.step_seconds()

    async def wait_dead(self) -> str:
        """Wait until the supervisor has given up, not for `stop`; the reason in one line."""
        await self._died.wait()
        return self._cause_of_death

    async def start(self) -> None:
        """Load the model and return when ready.

        Raises:
            EngineError: one line; CheckpointError or ConfigError where it is one.
        """
        assert self._supervisor is None, "start is called once"
        try:
            self._take(await self._starter.launch())
        except BaseException:
            self._phase = "dead"
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    def submit_all(self, jobs: Sequence[Job]) -> list[Generation]:
        """Admit the jobs of one call, all of them or none.

        Raises:
            QueueFullError: too much is queued.
            EngineUnavailableError: loading, restarting, draining or dead.
            RequestError: a token id does not fit 32 bits; PoisonError where the same request ended
                the engine before.
        """
        if self.state != "ready":
            raise EngineUnavailableError(f"the engine is {self.state}")
        return self._desk.submit_all(jobs)

    def hold(self, requests: int, prefill_tokens: int) -> AbstractContextManager[None]:
        """Count a call as queued while it is tokenised; raises QueueFullError on entry."""
        return self._desk.hold(requests, prefill_tokens)

    async def drain(self, seconds: float) -> None:
        """Take no new work; wait until live requests end, at most `seconds`."""
        self._draining = True
        ends = (self._desk.wait_idle(), self._sleep(seconds))
        tasks = [asyncio.ensure_future(end) for end in ends]
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
        await self._starter.stop()
        await self._child.shut_down(self._policy.stop_seconds)
        await self._child.drop()
        self._desk.fail_all("the engine was stopped")

    def _take(self, ready: ReadyChild) -> None:
        """Work with a child that is ready."""
        self._info = ready.info
        self._desk.know_model(ready.info)
        self._child.put(ready)
        self._last_sign = self._clock()
        self._phase = "ready"

    async def _supervise(self) -> None:
        """Listen to the engine; whenever it is lost, start another that goes on with its work."""
        try:
            while True:
                lost = await self._listen()
                logger.error("%s", lost)
                await self._lose()
                off = features_off(self.info.device, self._desk.most_crashes)
                self._take(await self._starter.launch_again(lost, off))
                self._recovery.features_off = off
                self._recovery.resumed += self._desk.resume()
        except EngineError as error:
            self._cause_of_death = str(error)
        except Exception as error:
            logger.exception("the supervisor of the engine failed")
            self._cause_of_death = f"the supervisor of the engine failed: {type(error).__name__}"
        self._phase = "dead"
        logger.error("the engine is dead: %s", self._cause_of_death)
        self._desk.fail_all("the engine is dead")
        await self._child.drop()
        self._died.set()

    async def _listen(self) -> str:
        """Dispatch reports until the engine is lost; says how."""
        try:
            while True:
                self._dispatch(await self._child.next_report())
        except ChildEndedError as error:
            return str(error)

    def _dispatch(self, report: Report) -> None:
        self._last_sign = self._clock()
        self._recovery.report(self._last_sign)
        self._stats.take(report.stats)
        for update in report.updates:
            self._desk.take(update)

    async def _lose(self) -> None:
        """Clean up after a child; what it still had to say is dropped with it.

        The note of its step is read first: it says who was being computed.
        """
        self._phase = "restarting"
        self._recovery.lose(self._clock())
        step = self._child.step()
        await self._child.drop()
        self._stats.lose_engine()
        crashes = self._desk.lose_engine(None if step is None else step.request_ids)
        if crashes:
            self._recovery.poisoned += 1
            self._starter.budget.give_back(crashes - 1)  # for the newest nothing is spent yet
