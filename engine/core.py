"""The loop of the engine: receive, schedule, start, read, emit.

`EngineCore` is the loop over its collaborators. What goes wrong with one request ends that request.
What goes wrong with a step ends the process, because nobody can say what it left behind; the
supervisor starts a fresh one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from engine.batch import Batch
from engine.errors import RequestError, StepMemoryError
from engine.flight import Flight, leaving, note_of
from engine.load_snapshot import with_load
from engine.messages import Abort, Add, Report, Shutdown, ToEngine
from engine.request import FinishReason
from engine.request_book import RequestBook
from engine.scheduler import Scheduler
from engine.step import Channel, Runner, StepResult
from engine.step_accounts import StepAccounts
from engine.step_note import StepNote

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.5  # between reports of an idle engine; well inside any hang deadline


class EngineCore:
    """The loop. `run` returns after Shutdown; any other end is an exception."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        channel: Channel,
        clock: Callable[[], float] = time.monotonic,
        note: Callable[[StepNote | None], None] = lambda _: None,
        dropped_lines: Callable[[], int] = int,
        look_ahead: bool | None = None,
    ) -> None:
        """
        Args:
            scheduler: decides what is computed.
            runner: computes it.
            channel: where messages come from and go to.
            clock: monotonic seconds, the front end's clock.
            note: told of each step before it is computed, and None when none is.
            dropped_lines: tells how many log lines of this process were lost.
            look_ahead: start steps before the one before is read (`engine.look_ahead`); None: if
                the runner overlaps.
        """
        self._dropped_lines = dropped_lines
        self._scheduler = scheduler
        self._runner = runner
        self._channel = channel
        self._clock = clock
        self._note = note
        self._book = RequestBook(runner.info)
        self._accounts = StepAccounts(runner.info.reads)
        self._looks_ahead = runner.overlaps if look_ahead is None else look_ahead
        # The step that is under way; a second one may be while it is read.
        self._flight: Flight | None = None
        self._rested = False
        self._stopping = False

    def run(self) -> None:
        """Work until Shutdown."""
        while not self._stopping:
            self.turn()

    def turn(self) -> None:
        """Take the messages that are there, then compute one step or rest."""
        for message in self._channel.receive(0.0 if self._has_work else IDLE_SECONDS):
            self._accept(message)
        self._expire()
        if self._has_work:
            self._rested = False
            self._compute()
        elif not self._rested:
            self._scheduler.check_integrity()
            self._rested = True
        self._emit()
        flight = self._flight
        self._note(None if flight is None else note_of(flight.batch, flight.began))

    @property
    def _has_work(self) -> bool:
        return bool(self._book.requests) or self._flight is not None

    def _accept(self, message: ToEngine) -> None:
        if isinstance(message, Add):
            self._add(message)
        elif isinstance(message, Abort):
            for request_id in message.request_ids:
                if request_id in self._book:
                    self._forget(request_id)
        elif isinstance(message, Shutdown):
            self._stopping = True

    def _add(self, message: Add) -> None:
        """Admit a request; whatever is wrong with it, it is answered and ends alone."""
        request_id = message.request_id
        if request_id in self._book:
            logger.error("request %d came twice: the second one is dropped", request_id)
            return
        try:
            self._scheduler.add(self._book.enter(message))
        except Exception as error:
            known = isinstance(error, RequestError)
            logger.warning("request %d refused: %s", request_id, error, exc_info=not known)
            self._book.refuse(message, self._clock())

    def _expire(self) -> None:
        """End the requests whose deadline has passed, queued or running.

        The front end tells its client by itself; here the pages are freed, also if it is late.
        """
        if not self._book.has_deadlines:
            return
        now = self._clock()
        for request_id in self._book.overdue(now):
            self._end(request_id, "deadline", now)

    def _compute(self) -> None:
        """Read one step, with the step after it under way already where that can be foreseen."""
        if self._flight is None:
            self._flight = self._begin()
        flight = self._flight
        if flight is None:
            return
        following = self._look_ahead(flight)
        try:
            result = flight.pending.finish()
        except StepMemoryError as error:
            self._give_up(flight, following, error)
            return
        now = self._clock()
        self._flight = following
        if following is not None:
            following.began = now
        self._account(flight, result, now)

    def _begin(self) -> Flight | None:
        """Start the step that is due, with nothing under way; None if there is no memory for it."""
        batch = self._scheduler.schedule()
        assert batch.spans, "the scheduler has work and found none"
        began = self._clock()
        self._book.stamp(batch, began)
        self._note(note_of(batch, began))
        return self._launch(batch, began)

    def _look_ahead(self, flight: Flight) -> Flight | None:
        """Start the step after one that is under way; None if it is to wait for the results.

        The note stays that of the older step, which has all requests of this one.
        """
        if not self._looks_ahead or self._stopping or flight.ended:
            return None
        leave = leaving(flight.batch, self._book.trackers)
        batch = None if leave is None else self._scheduler.follow(flight.batch, leave)
        return None if batch is None else self._launch(batch, self._clock())

    def _launch(self, batch: Batch, began: float) -> Flight | None:
        foreseen = self._scheduler.foresee(batch)
        try:
            pending = self._runner.start(batch, self._book.requests)
        except StepMemoryError as error:
            self._shrink(batch, error)
            return None
        return Flight(batch, pending, foreseen, began)

    def _give_up(self, flight: Flight, following: Flight | None, error: StepMemoryError) -> None:
        """A step found no memory after its start: neither it counts nor what went on from it."""
        if following is not None:
            with suppress(StepMemoryError):
                following.pending.finish()
        self._flight = None
        self._release(flight.ended)
        self._shrink(flight.batch, error)

    def _account(self, flight: Flight, result: StepResult, now: float) -> None:
        """Take over what a step brought for the requests that have not ended meanwhile."""
        seconds = now - flight.began
        self._scheduler.learn(flight.batch, seconds)
        self._release(flight.ended)
        batch, result = flight.batch.without(flight.ended), result.without(flight.ended)
        if not batch.spans:
            return
        self._accounts.count_step(batch, result, seconds, flight.foreseen)
        failed = self._fail(result, now)
        tokens = {
            request_id: sample.token
            for request_id, sample in result.samples.items()
            if request_id not in failed and sample.token is not None
        }
        well = batch.without(failed)
        self._scheduler.update(well, tokens)
        for request_id in well.request_ids:
            update = self._book.advance(request_id, result, tokens.get(request_id), now)
            if update.tokens:
                self._accounts.count_token()
            if update.finish_reason is not None:
                self._forget(request_id)

    def _shrink(self, batch: Batch, error: StepMemoryError) -> None:
        """A step found no memory: the next one holds less, without the request that is at fault."""
        at_fault = self._scheduler.shrink(batch)
        self._accounts.count_memory_retry()
        logger.warning("a step of %d tokens found no memory: %s", batch.num_tokens, error)
        if at_fault is not None and at_fault in self._book:
            logger.error("request %d finds no memory although it is alone", at_fault)
            self._end(at_fault, "error", self._clock())

    def _fail(self, result: StepResult, now: float) -> set[int]:
        """End the requests whose values were not finite, before their pages can be shared."""
        failed = result.failed | {r for r, sample in result.samples.items() if sample.token is None}
        for request_id in failed:
            logger.error("request %d: the model gave values that are not finite", request_id)
            self._end(request_id, "error", now)
        return failed

    def _end(self, request_id: int, reason: FinishReason, now: float) -> None:
        """Cut a request off: its last update, its pages, its state."""
        self._book.cut_off(request_id, reason, now)
        self._forget(request_id)

    def _forget(self, request_id: int) -> None:
        """A request ended. Its pages stay its own while a step that writes to them is under way."""
        self._book.remove(request_id)
        if self._flight is not None and self._flight.holds(request_id):
            self._flight.ended.add(request_id)
        else:
            self._release([request_id])

    def _release(self, request_ids: Iterable[int]) -> None:
        """Give back what requests hold that have ended."""
        for request_id in request_ids:
            self._scheduler.finish(request_id)
            self._runner.forget(request_id)

    def _emit(self) -> None:
        requests = self._book.requests.values()
        stats = with_load(self._accounts.stats, self._scheduler, requests)
        stats.log_lines_dropped = self._dropped_lines()
        self._channel.send(Report(updates=self._book.take_updates(), stats=stats))
