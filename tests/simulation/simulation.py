"""One run of one scenario."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from engine.client import Job
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.kv_pools import KvPools
from engine.process import EngineProcess
from engine.request import SamplingParams
from tests.simulation.checker import MAX_MODEL_LEN, check_stories
from tests.simulation.child import SimulatedChild, make_pools
from tests.simulation.client import Client
from tests.simulation.history import History
from tests.simulation.loop import StuckError, run_simulated
from tests.simulation.scenario import Scenario, draw_scenario
from tests.simulation.toy_model import toy_answer

QUIET_SECONDS = 1.5  # after the last client: the engine has nothing to do and says so
ALIVE_SECONDS = 0.8  # between two reports of an idle engine at most
SETTLE_SECONDS = 200.0  # for a restart that is under way then


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is made of; tests put a part with a known fault here, which must be found."""

    engine: Callable[..., EngineProcess] = EngineProcess
    child: Callable[..., SimulatedChild] = SimulatedChild
    pools: Callable[[Scenario], KvPools] = make_pools


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    scenario: Scenario
    history: History
    problems: list[str] = field(default_factory=list)


def simulate(seed: int, parts: Parts | None = None) -> Outcome:
    """Run a seed from start to end and check it."""
    run = _Run(draw_scenario(seed), parts if parts is not None else Parts())
    with run.watched_logs():
        try:
            run_simulated(run.main)
        except (StuckError, AssertionError) as error:
            run.history.violation(f"{type(error).__name__}: {error}")
    problems = [*run.history.violations, *check_stories(run.scenario, run.history)]
    return Outcome(run.scenario, run.history, problems)


class _Run:
    def __init__(self, scenario: Scenario, parts: Parts) -> None:
        self.scenario = scenario
        self.history = History(lambda: self._clock())
        self._clock: Callable[[], float] = lambda: 0.0
        self._parts = parts
        self._children: list[SimulatedChild] = []

    async def main(self) -> None:
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        loop.set_exception_handler(
            lambda _, context: self.history.violation(f"unhandled: {context}")
        )
        engine = self._parts.engine(
            EngineConfig(
                model="toy",
                max_num_seqs=self.scenario.max_num_seqs,
                max_batch_tokens=self.scenario.max_batch_tokens,
                prefix_caching=self.scenario.prefix_caching,
            ),
            max_queued_requests=self.scenario.max_queued_requests,
            max_queued_prefill_tokens=self.scenario.max_queued_prefill_tokens,
            policy=self.scenario.policy,
            launch=self._launch,
            clock=loop.time,
        )
        try:
            async with asyncio.timeout(self.scenario.interrupted_load):
                await engine.start()
        except (EngineError, TimeoutError) as error:
            self.history.refused_start = True
            self.history.note("the engine does not start: %s", repr(error))
        clients = [
            asyncio.ensure_future(Client(number, plan, engine, self.history).run())
            for number, plan in enumerate(self.scenario.clients)
        ]
        draining = asyncio.ensure_future(self._drain(engine))
        await asyncio.gather(*clients, draining)
        if self.scenario.drain is None:
            await self._come_to_rest(engine)
        await engine.stop()
        self._check_nothing_is_left(engine)

    async def _launch(self, _config: EngineConfig) -> SimulatedChild:
        number = self.history.launches
        self.history.launch_times.append(self._clock())
        child = self._parts.child(
            number, self.scenario, self.history, self._parts.pools(self.scenario)
        )
        self._children.append(child)
        return child

    async def _drain(self, engine: EngineProcess) -> None:
        if self.scenario.drain is not None:
            after, seconds = self.scenario.drain
            await asyncio.sleep(after)
            self.history.note("drain for %g s", seconds)
            await engine.drain(seconds)
            await engine.stop()

    async def _come_to_rest(self, engine: EngineProcess) -> None:
        """With nothing to do, nothing is held: pages, table entries, places in the queue."""
        end = self._clock() + SETTLE_SECONDS
        while self._clock() < end and engine.state != "dead":
            launches = self.history.launches
            await asyncio.sleep(QUIET_SECONDS)
            is_alive = engine.state == "ready" and engine.seconds_since_step() < ALIVE_SECONDS
            if is_alive and launches == self.history.launches:
                break
        if engine.state != "ready":
            if not self._may_be_dead(engine):
                self.history.violation(
                    f"the engine is {engine.state} after {self.history.launches} launches"
                )
            return
        scheduler = self._children[-1].scheduler
        scheduler.check_integrity()
        used = scheduler.pools.full.used, scheduler.pools.window.used
        if used != (0, 0) or scheduler.queues.num_running or scheduler.queues.num_waiting:
            self.history.violation(f"at rest the engine holds {used} pages")
        await self._probe(engine)
        before = self._clock()
        await engine.drain(1.0)
        if self._clock() != before:
            self.history.violation("at rest the engine still has live requests")

    async def _probe(self, engine: EngineProcess) -> None:
        """What comes next is served: no place in any queue was lost."""
        params = SamplingParams(max_tokens=3, temperature=0.0)
        try:
            generation = engine.submit_all([Job([1, 2, 3], params)])[0]
            while not generation.finished:
                if await generation.next_update(SETTLE_SECONDS) is None:
                    break
        except EngineError as error:
            if not self._may_be_dead(engine):
                self.history.violation(f"the last request: {error!r}")
            return
        if generation.output != toy_answer([1, 2, 3], params, MAX_MODEL_LEN).tokens:
            self.history.violation(f"the last request got {generation.output}")

    def _may_be_dead(self, engine: EngineProcess) -> bool:
        """Whether it is, and for a reason: it did not start, or was lost too often."""
        spent = self.history.launches > self.scenario.policy.max_restarts
        return engine.state == "dead" and (spent or self.history.refused_start)

    def _check_nothing_is_left(self, engine: EngineProcess) -> None:
        if engine.state != "dead":
            self.history.violation(f"a stopped engine is {engine.state}")
        if not all(child.closed for child in self._children):
            self.history.violation("an engine process was left running")
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            self.history.violation(f"tasks are left: {others}")

    @contextmanager
    def watched_logs(self) -> Iterator[None]:
        """A traceback in the engine's log is a violation; the log itself goes to the history."""
        handler = _LogHandler(self.history)
        logger = logging.getLogger("engine")
        before = logger.propagate, logger.level
        logger.propagate = False
        logger.setLevel(logging.ERROR)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate, level = before
            logger.setLevel(level)


class _LogHandler(logging.Handler):
    def __init__(self, history: History) -> None:
        super().__init__()
        self._history = history

    def emit(self, record: logging.LogRecord) -> None:
        self._history.note("%s", f"{record.name}: {record.getMessage()}")
        if record.exc_info is not None:
            self._history.violation(f"{record.getMessage()}: {record.exc_info[1]!r}")
