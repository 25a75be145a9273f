"""The engine process that runs, if one does: who speaks to it need not know which one it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.messages import Report, ToEngine
from engine.starter import ReadyChild
from engine.step_note import StepNote
from engine.supervision import SupervisionPolicy
from engine.watch import Watch


class RunningChild:
    """The place of one child after another, each of them watched; empty while none is ready."""

    def __init__(self, policy: SupervisionPolicy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._watch: Watch | None = None

    @property
    def pid(self) -> int | None:
        """The process id, None while there is none."""
        return None if self._watch is None else self._watch.child.pid

    def put(self, ready: ReadyChild) -> None:
        """A child takes work; the one before was dropped."""
        assert self._watch is None
        self._watch = Watch(ready.child, ready.info.device, self._policy, self._clock)

    def send(self, messages: Sequence[ToEngine]) -> None:
        """Hand messages over. With none there they are lost: the next one gets all that is live."""
        if self._watch is not None:
            for message in messages:
                self._watch.child.send(message)

    async def next_report(self) -> Report:
        """Raises ChildEndedError when it is of no use any more; one line says why."""
        assert self._watch is not None
        return await self._watch.next_report()

    def step(self) -> StepNote | None:
        """The step that it computes, or was computing when it ended; None between steps."""
        return None if self._watch is None else self._watch.child.step()

    def step_seconds(self) -> float:
        """How much longer than an ordinary one the step under way may take; 0 between steps."""
        return 0.0 if self._watch is None else self._watch.step_seconds()

    async def shut_down(self, seconds: float) -> None:
        """Ask it to leave and give it `seconds`; `drop` then makes sure."""
        if self._watch is not None:
            await self._watch.child.shut_down(seconds)

    async def drop(self) -> None:
        """End it. It is forgotten only when it is closed: who is interrupted here drops again."""
        if self._watch is not None:
            await self._watch.child.close()
            self._watch = None
