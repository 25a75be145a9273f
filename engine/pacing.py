"""Chunks sized by the time that they will take, so that nobody waits long for a long prompt."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from engine.batch import Span
from engine.request import Request
from engine.step_time import StepLoad, StepTimeModel


@dataclass(frozen=True, slots=True)
class Room:
    """What a chunk may take."""

    seconds: float
    beside: int  # tokens of other chunks that are in the step


NO_LIMIT = Room(math.inf, 0)


class Pacer:
    """Cuts chunks so that a step with several sequences stays within a time.

    It learns from the steps that it is told of. Without a limit it learns all the same, to foresee,
    and cuts nothing.
    """

    def __init__(self, max_step_seconds: float | None, block_tokens: int) -> None:
        """
        Args:
            max_step_seconds: of a step in which others wait for tokens; None: no limit.
            block_tokens: chunks end at the end of a block, where they do not end the prompt.
        """
        self._limit = math.inf if max_step_seconds is None else max_step_seconds
        self._block = block_tokens
        self._model = StepTimeModel()

    def learn(self, spans: Iterable[Span], seconds: float) -> None:
        """A step of these spans took so long."""
        self._model.observe(StepLoad.of(spans), seconds)

    def foresee(self, spans: Iterable[Span]) -> float:
        """Seconds that a step of these spans will take; 0 while nothing is known."""
        return self._model.predict(StepLoad.of(spans))

    def room(self, spans: Iterable[Span]) -> Room:
        """What is left for chunks beside these spans: a third of the step at least, since where the
        rows alone take longer than the limit, prompts must get on all the same."""
        if self._limit == math.inf:
            return NO_LIMIT
        load = StepLoad.of(spans)
        taken = self._model.predict(load if load.tokens else load.with_chunk())
        return Room(max(self._limit - taken, 0.0 if load.tokens else taken / 2), load.tokens)

    def share(self, room: Room, others: Iterable[Request]) -> Room:
        """What one request may take of it: what the others leave, at least half."""
        if room.seconds == math.inf:
            return room
        theirs = sum(self._model.chunk_seconds(r.computed, r.remaining) for r in others)
        return replace(room, seconds=max(room.seconds - theirs, room.seconds / 2))

    def cut(self, request: Request, tokens: int, room: Room) -> int:
        """How many of the next `tokens` tokens of a request fit, in whole blocks or 0."""
        if room.seconds == math.inf:
            return tokens
        fitting = self._model.tokens_within(room.seconds, request.computed, room.beside)
        if fitting >= min(tokens, request.remaining):
            return tokens
        stop = (request.computed + fitting) // self._block * self._block
        return min(max(stop - request.computed, 0), tokens)

    def to_block_end(self, request: Request) -> int:
        """The least that a chunk is worth: the tokens up to the end of a block."""
        return self._block - request.computed % self._block
