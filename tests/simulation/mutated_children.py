"""Engines with a fault put in: their channel, their loop or their scheduler."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from engine.batch import Batch
from engine.core import EngineCore
from engine.flight import Flight
from engine.messages import Abort, Add, FromEngine, Progress, Report, ToEngine
from engine.request import Request
from engine.scheduler import Scheduler
from tests.simulation.child import SimulatedChild


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


CHILDREN = (
    *(ResendingChild, LosingChild, SwappingChild, ForgetfulReplay, ReplayShort, ReplayOtherSeed),
    *(ReplayWithoutProgress, DeafChild, SkippingChild, IdleChild),
    *(StaleChild, ForgetfulChild, HastyChild),
)
