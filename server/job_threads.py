"""Work off the event loop, each piece in a thread of its own, few at once, and under a deadline.

A thread cannot be killed. One that hangs is left behind and its place given to the next, so that
it costs the request that it was for and no other. Pools of the standard library would wait for it
at exit, and hand its place to nobody.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from server.errors import ApiError, invalid

T = TypeVar("T")


class JobThreads:
    """Runs jobs for one event loop."""

    def __init__(self, most: int, seconds: float, most_stuck: int = 8) -> None:
        """
        Args:
            most: jobs at once; others wait in the order of their arrival.
            seconds: for one job.
            most_stuck: threads left behind, beyond which no job is started any more.
        """
        self._places = asyncio.Semaphore(most)
        self._seconds = seconds
        self._most_stuck = most_stuck
        self.stuck = 0  # threads that were left behind and have not come back yet

    async def run(self, job: Callable[..., T], *args: Any) -> T:
        """The job's result. A caller that is cancelled does not wait; the job keeps its place.

        Raises:
            ApiError: 400, it took too long; 503, too many jobs before it never ended.
            Exception: what the job raised.
        """
        await self._places.acquire()
        if self.stuck >= self._most_stuck:
            self._places.release()
            raise ApiError(503, "text cannot be processed at present", code="threads_stuck")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        timer = loop.call_later(self._seconds, self._leave_behind, done)
        done.add_done_callback(lambda _: self._settle(done, timer))

        def work() -> None:
            outcome = _outcome(job, args)
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._finish, done, *outcome)

        try:
            threading.Thread(target=work, name="job", daemon=True).start()
        except RuntimeError as error:  # no thread can be started
            done.set_exception(error)
        return await asyncio.shield(done)

    def _finish(self, done: asyncio.Future[T], result: T, error: Exception | None) -> None:
        if done.done():
            self.stuck -= 1
        elif error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)

    def _leave_behind(self, done: asyncio.Future[T]) -> None:
        if not done.done():
            self.stuck += 1
            done.set_exception(
                invalid(f"processing took longer than {self._seconds:g} s", code="too_slow")
            )

    def _settle(self, done: asyncio.Future[T], timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        self._places.release()
        done.exception()  # looked at, also if the caller has gone


def _outcome(job: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    """Result and error; what a future cannot carry (a panic of a native library) is wrapped."""
    try:
        return job(*args), None
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            return None, error
        wrapped = RuntimeError(f"a job ended with {type(error).__name__}")
        wrapped.__cause__ = error
        return None, wrapped
