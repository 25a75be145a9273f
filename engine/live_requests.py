"""The requests that have not ended, whichever engine process works on them."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from engine.client import Generation
from engine.errors import EngineError
from engine.messages import Add, RequestUpdate
from engine.replay_order import ReplayOrder


@dataclass(frozen=True, slots=True)
class _Live:
    generation: Generation
    add: Add  # as it came, without its prompt, which the generation holds

    def message(self) -> Add:
        """What an engine needs to begin, or to go on from what was received."""
        received = self.generation.received
        return msgspec.structs.replace(
            self.add,
            prompt=array("i", self.generation.prompt).tobytes(),
            output=array("i", received.output).tobytes(),
            progress=received.progress(),
        )


class LiveRequests:
    """Holds them in order of arrival. Methods return what is to be sent to the engine now."""

    def __init__(self, max_resumes: int) -> None:
        """`max_resumes`: see `engine.replay_order`."""
        self._live: dict[int, _Live] = {}
        self._order = ReplayOrder(max_resumes)

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._live

    @property
    def most_crashes(self) -> int:
        """Of all of them: engines that one request ended in a row without getting further."""
        return self._order.most_crashes

    def add(self, generation: Generation, add: Add) -> list[Add]:
        """A new request; it may have to wait while others are tried alone."""
        bare = msgspec.structs.replace(add, prompt=b"")
        self._live[add.request_id] = _Live(generation, bare)
        return [add] if self._order.enter(add.request_id) else []

    def push(self, update: RequestUpdate) -> list[Add]:
        """News of a request; of one that was aborted meanwhile it is dropped."""
        live = self._live.get(update.request_id)
        if live is None:
            return []
        further = live.generation.push(update)
        if update.finish_reason is not None:
            return self.remove(update.request_id)
        return self._messages(self._order.got_further(update.request_id)) if further else []

    def remove(self, request_id: int) -> list[Add]:
        """A request ended or was aborted."""
        del self._live[request_id]
        return self._messages(self._order.leave(request_id))

    def lose_engine(self, in_step: Collection[int] | None) -> tuple[Generation, int] | None:
        """The engine is lost while it computed `in_step` (None: between steps).

        Returns:
            The request that alone is to blame, if one is, and the crashes that it caused. It is
            no longer live; the caller fails it.
        """
        found = self._order.crash(in_step)
        if found is None:
            return None
        guilty, crashes = found
        generation = self._live[guilty].generation
        self.remove(guilty)
        return generation, crashes

    def resume(self) -> list[Add]:
        """Another engine takes work."""
        for live in self._live.values():
            live.generation.resumes += 1
        return self._messages(self._order.restart())

    def fail_all(self, error: EngineError) -> None:
        """End all of them with an error."""
        for request_id, live in list(self._live.items()):
            live.generation.fail(error)
            self.remove(request_id)

    def _messages(self, request_ids: list[int]) -> list[Add]:
        return [self._live[request_id].message() for request_id in request_ids]
