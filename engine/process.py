"""The engine as the front end sees it: a child process that is watched and started again.

States:

    loading -> ready -> restarting -> ready ...   a crash or a hang; live requests wait
                  \\-> draining                    no new work, the live ones end
    any     -> dead                               the first load failed, the restart budget is
                                                  spent, or `stop` was called

A live request outlasts the engine process: the next one gets its prompt, the tokens received so
far and what was told of it, and goes on (`engine.live_requests`). Which requests it gets first, and
when one of them is failed because it ends every engine, is decided in `engine.replay_order`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager

from engine.admission import AdmissionQueue, prefill_charges
from engine.child import EngineChild
from engine.child_protocol import Child, ChildEndedError, LaunchChild
from engine.client import EngineState, Generation, Job
from engine.config import EngineConfig
from engine.errors import EngineError, EngineUnavailableError, PoisonError, RequestError
from engine.fallback import features_off
from engine.live_requests import LiveRequests
from engine.messages import Abort, Add, EngineInfo, Report, RequestUpdate, Stats
from engine.poison import PoisonList
from engine.recovery import Recovery
from engine.request import SamplingParams
from engine.starter import ReadyChild, Starter
from engine.stats_total import StatsTotal
from engine.supervision import SupervisionPolicy
from engine.watch import Watch

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
        self._policy = policy if policy is not None else SupervisionPolicy()
        self._clock = clock
        self._sleep = sleep
        self._starter = Starter(config, self._policy, launch, clock, sleep)
        self._prefix_caching = config.prefix_caching
        self._queue = AdmissionQueue(
            clock,
            max_requests=max_queued_requests,
            max_prefill_tokens=max_queued_prefill_tokens,
            small_tokens=config.max_batch_tokens,
        )
        self._live = LiveRequests(self._policy.max_resumes)
        self._poison = PoisonList(self._policy.poison_seconds, clock)
        self._ids = itertools.count(1)
        self._phase: EngineState = "loading"
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._watch: Watch | None = None  # over the child that runs
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
        return None if self._watch is None else self._watch.child.pid

    def seconds_since_step(self) -> float:
        """Age of the last sign of life; the loop also gives one while idle."""
        return self._clock() - self._last_sign

    def step_seconds(self) -> float:
        """How much longer than an ordinary one the step under way may take; 0 between steps."""
        return 0.0 if self._watch is None else self._watch.step_seconds()

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
            watch = self._take(await self._starter.launch())
        except BaseException:
            self._phase = "dead"
            raise
        self._supervisor = asyncio.create_task(self._supervise(watch), name="engine-supervisor")

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, deadline: float | None = None
    ) -> Generation:
        """Admit a single request, as `submit_all`."""
        return self.submit_all([Job(prompt, params, deadline)])[0]

    def submit_all(self, jobs: Sequence[Job]) -> list[Generation]:
        """Admit the jobs of one call, all of them or none.

        Raises:
            QueueFullError: too much is queued.
            EngineUnavailableError: loading, restarting, draining or dead.
            RequestError: a token id does not fit 32 bits; PoisonError where the same request ended
                the engine before.
        """
        if self.state != "ready" or self._watch is None:
            raise EngineUnavailableError(f"the engine is {self.state}")
        distinct = {id(job.prompt): job.prompt for job in jobs}
        buffers = {key: _int32_buffer(prompt) for key, prompt in distinct.items()}
        prompts = [buffers[id(job.prompt)] for job in jobs]
        if any(map(self._poison.holds, prompts, (job.params for job in jobs))):
            raise PoisonError("the same request ended the engine before")
        shares = self._prefix_caching and all(j.params.prompt_logprobs is None for j in jobs)
        charges = prefill_charges(prompts, self.info.block_tokens if shares else None)
        self._queue.check(len(jobs), sum(charges))
        return [self._begin(*one) for one in zip(jobs, prompts, charges, strict=True)]

    def hold(self, requests: int, prefill_tokens: int) -> AbstractContextManager[None]:
        """Count a call as queued while it is tokenised; raises QueueFullError on entry."""
        return self._queue.hold(requests, prefill_tokens)

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
        self._send(self._live.add(generation, add))
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
        await self._starter.stop()
        if self._watch is not None:
            await self._watch.child.shut_down(self._policy.stop_seconds)
        await self._drop_child()
        self._fail_live("the engine was stopped")

    def _take(self, ready: ReadyChild) -> Watch:
        """Work with a child that is ready."""
        self._info = ready.info
        self._queue.know_longest(ready.info.max_model_len)
        self._watch = Watch(ready.child, ready.info.device, self._policy, self._clock)
        self._last_sign = self._clock()
        self._phase = "ready"
        return self._watch

    async def _supervise(self, watch: Watch) -> None:
        """Listen to the engine; whenever it is lost, start another that goes on with its work."""
        try:
            while True:
                lost = await self._listen(watch)
                logger.error("%s", lost)
                await self._lose(watch.child)
                off = features_off(self.info.device, self._live.most_crashes)
                watch = self._take(await self._starter.launch_again(lost, off))
                self._recovery.features_off = off
                self._resume()
        except EngineError as error:
            self._cause_of_death = str(error)
        except Exception as error:
            logger.exception("the supervisor of the engine failed")
            self._cause_of_death = f"the supervisor of the engine failed: {type(error).__name__}"
        self._phase = "dead"
        logger.error("the engine is dead: %s", self._cause_of_death)
        self._fail_live("the engine is dead")
        await self._drop_child()
        self._died.set()

    async def _listen(self, watch: Watch) -> str:
        """Dispatch reports until the engine is lost; says how."""
        try:
            while True:
                self._dispatch(await watch.next_report())
        except ChildEndedError as error:
            return str(error)

    def _dispatch(self, report: Report) -> None:
        self._last_sign = self._clock()
        self._recovery.report(self._last_sign)
        self._stats.take(report.stats)
        for update in report.updates:
            self._queue.progress(update.request_id, update.prefilled, update.cached)
            self._send(self._live.push(update))
            if update.finish_reason is not None:
                self._forget(update.request_id)

    async def _lose(self, child: Child) -> None:
        """Clean up after a child; what it still had to say is dropped with it.

        The note of its step is read first: it says who was being computed.
        """
        self._phase = "restarting"
        self._recovery.lose(self._clock())
        step = child.step()
        await self._drop_child()
        self._stats.lose_engine()
        self._queue.restart()
        guilty = self._live.lose_engine(None if step is None else step.request_ids)
        if guilty is not None:
            self._condemn(*guilty)

    def _condemn(self, generation: Generation, crashes: int) -> None:
        """Fail a request that alone ended the engine again and again, and refuse its like."""
        request_id = generation.request_id
        logger.error("request %d ended the engine %d times and is failed", request_id, crashes)
        self._poison.add(_int32_buffer(generation.prompt), generation.params)
        self._recovery.poisoned += 1
        self._starter.budget.give_back(crashes - 1)  # for the newest loss nothing is spent yet
        generation.push(RequestUpdate(request_id=request_id, finish_reason="error"))
        self._forget(request_id)

    def _resume(self) -> None:
        """Give the new engine what the one before was lost with."""
        if self._live:
            logger.info("%d requests go on in engine process %s", len(self._live), self.pid)
        self._recovery.resumed += len(self._live)
        self._send(self._live.resume())

    def _send(self, messages: Sequence[Add | Abort]) -> None:
        for message in messages:
            if self._watch is not None:
                self._watch.child.send(message)

    async def _drop_child(self) -> None:
        """Forget the child only when it is closed: `stop` may interrupt the supervisor in here."""
        if self._watch is not None:
            await self._watch.child.close()
            self._watch = None

    def _abort(self, request_id: int) -> None:
        if request_id in self._live:
            self._send([Abort([request_id])])
            self._send(self._live.remove(request_id))
            self._forget(request_id)

    def _forget(self, request_id: int) -> None:
        """A request is no longer live."""
        self._queue.leave(request_id)
        if not self._live:
            self._idle.set()

    def _fail_live(self, message: str) -> None:
        self._live.fail_all(EngineUnavailableError(message))
        self._queue.clear()
        self._idle.set()


def _int32_buffer(tokens: Sequence[int]) -> bytes:
    try:
        return array("i", tokens).tobytes()
    except OverflowError as error:
        raise RequestError("a token id does not fit 32 bits") from error
