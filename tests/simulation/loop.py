"""An asyncio loop without sockets and threads whose clock jumps to the next timer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class StuckError(Exception):
    """Nothing can ever happen again, but something is being waited for."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs what is ready; when nothing is, it is at once the time of the next timer.

    asyncio's own timers, timeouts and tasks work as always, in an order that depends on nothing
    outside the program.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._clock_resolution = 1e-9
        self._selector = self  # what the base class asks to wait for

    def time(self) -> float:
        """Simulated seconds."""
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """The base class would wait here for sockets, up to `timeout` seconds."""
        if timeout is None:
            raise StuckError("every task waits for another one")
        self._now += timeout
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        """Wakes a loop that waits for sockets; this one never does."""


class Signal:
    """Wakes one waiter, at a time or earlier."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, until: float | None = None) -> None:
        """Returns at `until`, or as soon as `wake` is called."""
        self._waiter = self._loop.create_future()
        timer = None if until is None else self._loop.call_at(until, self.wake)
        try:
            await self._waiter
        finally:
            if timer is not None:
                timer.cancel()


def run_simulated(main: Callable[[], Any]) -> Any:
    """The result of the coroutine function `main` under a new loop; nothing may be left running.

    Raises:
        StuckError: it waits for something that cannot happen.
    """
    loop = SimulatedLoop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main())
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.call_soon(loop.stop)
        loop.run_forever()
        asyncio.set_event_loop(None)
        loop.close()
