"""Pools and supervisors with a fault put in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.config import EngineConfig
from engine.kv_pools import KvPools
from engine.process import EngineProcess
from engine.request import Request
from engine.stats_total import StatsTotal
from engine.supervision import SupervisionPolicy
from tests.simulation.child import BLOCK


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


POOLS = (LeakingPools, EarlySharingPools, NarrowPools, UnevenPools)
SUPERVISORS = (
    *(FailingSupervisor, PatientSupervisor, HastySupervisor, FullSupervisor),
    *(ForgettingSupervisor, IndulgentSupervisor),
)
