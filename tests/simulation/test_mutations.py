"""A simulation that cannot fail proves nothing: known faults are put in, and seeds must find them.

Each mutation is a small, plausible mistake in one real part. It must show within fewer seeds than
the suite runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest

from engine.batch import Batch
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.flight import Flight
from engine.kv_pools import KvPools
from engine.messages import Abort, Add, FromEngine, Progress, Report, ToEngine
from engine.process import EngineProcess
from engine.request import Request
from engine.scheduler import Scheduler
from engine.stats_total import StatsTotal
from engine.supervision import SupervisionPolicy
from tests.simulation.child import BLOCK, SimulatedChild, make_pools
from tests.simulation.simulation import Parts, simulate

SEEDS = range(2000)  # as many as the suite runs


class ResendingChild(SimulatedChild):
    """Now and then a report is sent twice."""

    def leave(self, message: FromEngine) -> None:
        super().leave(message)
        if isinstance(message, Report) and message.stats.step % 11 == 5 and message.updates:
            self._reports.append(self._reports[-1])


class LosingChild(SimulatedChild):
    """Now and then a report is lost although nothing crashed."""

    def leave(self, message: FromEngine) -> None:
        super().leave(message)
        if isinstance(message, Report) and message.stats.step % 11 == 5 and message.updates:
            self._reports.pop()


class SwappingChild(SimulatedChild):
    """Now and then two reports change places."""

    def leave(self, message: FromEngine) -> None:
        super().leave(message)
        if isinstance(message, Report) and message.stats.step % 5 == 3 and len(self._reports) > 1:
            self._reports[-1], self._reports[-2] = self._reports[-2], self._reports[-1]


class ForgetfulReplay(SimulatedChild):
    """A resumed request starts again: what was generated does not go with it."""

    def send(self, message: ToEngine) -> None:
        if isinstance(message, Add):
            message = msgspec.structs.replace(message, output=b"")
        super().send(message)


class ReplayShort(SimulatedChild):
    """A resumed request goes on one token too early."""

    def send(self, message: ToEngine) -> None:
        if isinstance(message, Add):
            message = msgspec.structs.replace(message, output=message.output[:-4])
        super().send(message)


class ReplayOtherSeed(SimulatedChild):
    """A resumed request draws from another seed."""

    def send(self, message: ToEngine) -> None:
        if isinstance(message, Add) and message.output:
            params = msgspec.structs.replace(message.params, seed=message.params.seed + 1)
            message = msgspec.structs.replace(message, params=params)
        super().send(message)


class ReplayWithoutProgress(SimulatedChild):
    """A resumed request tells the log-probabilities of its prompt again."""

    def send(self, message: ToEngine) -> None:
        if isinstance(message, Add):
            message = msgspec.structs.replace(message, progress=Progress())
        super().send(message)


class DeafCore(EngineCore):
    """Aborts are not heard."""

    def _accept(self, message: ToEngine) -> None:
        if not isinstance(message, Abort):
            super()._accept(message)


class DeafChild(SimulatedChild):
    make_core = DeafCore


class SkippingScheduler(Scheduler):
    """A token that was sampled while several decode is dropped now and then."""

    def update(self, batch: Batch, tokens: Mapping[int, int]) -> None:
        if len(tokens) > 2:
            tokens = dict(list(tokens.items())[1:])
        super().update(batch, tokens)


class SkippingChild(SimulatedChild):
    make_scheduler = SkippingScheduler


class IdleScheduler(Scheduler):
    """A full pool stops everybody: nobody is preempted for the oldest."""

    def _preempt_for(self, request: Request) -> bool:
        return False


class IdleChild(SimulatedChild):
    make_scheduler = IdleScheduler


class StaleScheduler(Scheduler):
    """A row that is started ahead goes on from the newest token that the host knows."""

    def follow(self, batch: Batch, leaving: Collection[int]) -> Batch | None:
        ahead = super().follow(batch, leaving)
        if ahead is None:
            return None
        tokens = {span.request_id: span.tokens for span in batch.spans}
        return Batch([span._replace(tokens=tokens[span.request_id]) for span in ahead.spans])


class StaleChild(SimulatedChild):
    make_scheduler = StaleScheduler


class ForgetfulCore(EngineCore):
    """The row of a request that has ended counts after all."""

    def _forget(self, request_id: int) -> None:
        super()._forget(request_id)
        if self._flight is not None:
            self._flight.ended.clear()


class ForgetfulChild(SimulatedChild):
    make_core = ForgetfulCore


class HastyCore(EngineCore):
    """Pages go back as soon as a request ends, and the next step is started as if nothing were."""

    def _forget(self, request_id: int) -> None:
        super()._forget(request_id)
        self._release([request_id])

    def _look_ahead(self, flight: Flight) -> Flight | None:
        ended, flight.ended = flight.ended, set()
        flight.batch, whole = flight.batch.without(ended), flight.batch
        try:
            return super()._look_ahead(flight)
        finally:
            flight.ended, flight.batch = ended, whole


class HastyChild(SimulatedChild):
    make_core = HastyCore


class LeakingPools(KvPools):
    """The last page of a request is not given back."""

    def release(self, request: Request) -> None:
        if len(request.full_blocks) > 3:
            request.full_blocks.pop()
        super().release(request)


class EarlySharingPools(KvPools):
    """Pages of a prompt are shared before they are computed."""

    def _register(self, request: Request) -> None:
        computed = request.computed
        held = min(len(request.full_blocks), len(request.window_blocks)) * BLOCK
        request.computed = max(computed, min(request.prompt_len, held))
        super()._register(request)
        request.computed = computed


class NarrowPools(KvPools):
    """The window slides one block too far."""

    def _slide(self, request: Request) -> None:
        request.computed += BLOCK
        super()._slide(request)
        request.computed -= BLOCK


class UnevenPools(KvPools):
    """The sinks are not kept for a request that shares a prefix."""

    def take(self, request: Request, tokens: int) -> None:
        super().take(request, tokens)
        if request.window_start > 0 and request.window_blocks[0]:
            self.window.release(request.window_blocks[0])
            request.window_blocks[0] = 0


class FailingSupervisor(EngineProcess):
    """A lost engine fails the requests that it had, as other servers do."""

    async def _lose(self) -> None:
        await super()._lose()
        self._desk.fail_all("the engine is restarting")


class PatientSupervisor(EngineProcess):
    """A hang is not noticed for days."""

    def __init__(self, config: EngineConfig, *, policy: SupervisionPolicy, **others: Any) -> None:
        super().__init__(config, policy=replace(policy, silence_seconds=1e6), **others)


class HastySupervisor(EngineProcess):
    """A lost engine is left running when the service stops at that moment."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._child.drop = self._drop  # type: ignore[method-assign]

    async def _drop(self) -> None:
        watch, self._child._watch = self._child._watch, None
        if watch is not None:
            await watch.child.close()


class FullSupervisor(EngineProcess):
    """A request that ends without having begun keeps its place in the queue."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._desk._queue.leave = lambda request_id: None  # type: ignore[method-assign]


class ForgettingSupervisor(EngineProcess):
    """Totals begin again with each engine."""

    async def _lose(self) -> None:
        await super()._lose()
        self._stats = StatsTotal()


class IndulgentSupervisor(EngineProcess):
    """Nobody is ever blamed, so a request that kills the engine kills it for ever."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._desk._condemn = lambda *_: None  # type: ignore[method-assign]


def pools_of(kind: type[KvPools]) -> Parts:
    return Parts(pools=partial(make_pools, kind=kind))


CHILDREN = (
    *(ResendingChild, LosingChild, SwappingChild, ForgetfulReplay, ReplayShort, ReplayOtherSeed),
    *(ReplayWithoutProgress, DeafChild, SkippingChild, IdleChild),
    *(StaleChild, ForgetfulChild, HastyChild),
)
POOLS = (LeakingPools, EarlySharingPools, NarrowPools, UnevenPools)
SUPERVISORS = (
    *(FailingSupervisor, PatientSupervisor, HastySupervisor, FullSupervisor),
    *(ForgettingSupervisor, IndulgentSupervisor),
)
MUTATIONS = {
    **{kind.__name__: Parts(child=kind) for kind in CHILDREN},
    **{kind.__name__: pools_of(kind) for kind in POOLS},
    **{kind.__name__: Parts(engine=kind) for kind in SUPERVISORS},
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_seeds_find_a_fault_that_was_put_in(name: str) -> None:
    assert any(simulate(seed, MUTATIONS[name]).problems for seed in SEEDS)
