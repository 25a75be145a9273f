"""Server-sent events written straight to the ASGI channel, with an eye on the reader.

Headers leave at once. A reader that disconnects cancels the source; one that stops reading for
longer than the grace, or leaves more unread than it may, is dropped as a slow consumer. Generation
never waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
CHECK_SECONDS = 0.25  # between two looks at what a reader has left unread
_encoder = msgspec.json.Encoder()


def event(payload: Any) -> bytes:
    """One `data:` event of compact JSON."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


def comment(text: str) -> bytes:
    """A line that clients ignore and connections live on."""
    return f": {text}\n\n".encode()


@dataclass(frozen=True, slots=True)
class Patience:
    """With one reader."""

    seconds: float  # for a write to be taken
    unread: Callable[[], int]  # bytes generated that wait behind that write
    max_unread: int


class EventStream(Response):
    """A streaming answer. `close(reason)` is called once, with None after a complete stream."""

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncIterator[bytes],
        close: Callable[[str | None], None],
        patience: Patience,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._source = source
        self._close = close
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason: str | None = "abort"
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await until_disconnect(self._write(send), receive)
            reason = None
        except TimeoutError:
            reason = "slow_consumer"
        except ClientDisconnect:
            pass
        finally:
            self._close(reason)

    async def _write(self, send: Send) -> None:
        async for chunk in self._source:
            async with self._patiently():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @asynccontextmanager
    async def _patiently(self) -> AsyncIterator[None]:
        """Raises TimeoutError in what it encloses when the reader has used up its patience."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._patience.seconds) as limit:
            self._next_look = loop.call_later(CHECK_SECONDS, self._look, limit)
            try:
                yield
            finally:
                self._next_look.cancel()

    def _look(self, limit: asyncio.Timeout) -> None:
        """End a write behind which too much waits; else look again."""
        loop = asyncio.get_running_loop()
        if self._patience.unread() > self._patience.max_unread:
            limit.reschedule(loop.time())
        self._next_look = loop.call_later(CHECK_SECONDS, self._look, limit)


async def until_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: it went away first.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, watcher):
            if not pending.done():
                pending.cancel()
                with suppress(asyncio.CancelledError):
                    await pending


async def answered(work: Coroutine[Any, Any, T], request: Request) -> T:
    """`until_disconnect` for a route that answers at once."""
    return await until_disconnect(work, request.receive)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone; the body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
