"""uvicorn's h11 protocol with the limits that it lacks: connections, slow writers and readers.

h11 itself bounds the bytes of a head (`h11_max_incomplete_event_size`).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.connections import ConnectionCounter, ProbesOnly
from server.errors import ApiError

LINGER_SECONDS = 1.0  # for a refused client to finish sending and read why
SLOWEST_READER = 100  # bytes a second; whoever takes less than that reads nothing
_READ_AHEAD = 64 * 2**10  # bytes of a next request, read so that a client's leaving is noticed
_FREE_CHUNKS = 1024  # of a body in chunks, however small they are
_SMALLEST_CHUNK = 64  # bytes on average beyond those


@dataclass(frozen=True, slots=True)
class ProtocolLimits:
    """What one connection may cost."""

    max_header_bytes: int
    max_connections: int
    max_connections_per_client: int  # 0: no limit
    header_seconds: float  # for a head, from its first byte or from the connection's start
    body_seconds: float  # for the body, from the end of the head
    reader_seconds: float  # without progress, of a reader
    probes: Collection[str]  # paths that are served above `max_connections`


class BoundedConnection(h11.Connection):
    """h11's parser, without the bodies that cost a hundred times what they carry."""

    _chunks = 0
    _bytes = 0

    def next_event(self) -> Any:
        """h11's next event.

        Raises:
            h11.RemoteProtocolError: what the client sends is no HTTP, or comes in crumbs: 16 MiB
                in chunks of one byte took minutes of the event loop.
        """
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += 1
            self._bytes += len(event.data)
            if self._chunks > _FREE_CHUNKS + self._bytes // _SMALLEST_CHUNK:
                raise h11.RemoteProtocolError("the chunks of the body are too small")
        return event


def limited_protocol(
    limits: ProtocolLimits, refused: Callable[[ApiError], None]
) -> type[H11Protocol]:
    """A protocol class with these limits, to give to `uvicorn.Config(http=...)`.

    `refused` is told of every answer that the application does not see.
    """
    counter = ConnectionCounter(limits.max_connections, limits.max_connections_per_client)

    class LimitedH11Protocol(H11Protocol):
        """One connection. A request must arrive whole within the seconds that its parts have.

        A reader that takes nothing for `reader_seconds` loses its connection. Closing alone would
        wait until all is written, that is for as long as the reader likes.
        """

        _receipt_timer: asyncio.TimerHandle | None = None
        _receives_body = False  # what the timer is for
        _reader_timer: asyncio.TimerHandle | None = None
        _unread = 0  # bytes in the write buffer when the timer was started
        _ahead = 0  # bytes read while an answer was under way
        _refused = False
        _client = ""

        def connection_made(self, transport: Any) -> None:
            self.conn = BoundedConnection(h11.SERVER, limits.max_header_bytes)
            super().connection_made(transport)
            self._client = self.client[0] if self.client else ""
            if not counter.is_welcome(self._client):
                transport.close()
                return
            if counter.is_full:
                self.app = ProbesOnly(self.app, limits.probes)
                counter.reserve(self)
            self._start_timer(limits.header_seconds)

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return  # read and dropped, so that our answer is not lost to a reset
            between = self.cycle is None or self.cycle.response_complete
            if between and self._receipt_timer is None:
                self._start_timer(limits.header_seconds)
            is_next = self.conn.their_state is h11.DONE
            super().data_received(data)
            self._ahead = self._ahead + len(data) if is_next else 0
            self._watch_receipt()
            if self.conn.their_state is h11.DONE and self._ahead < _READ_AHEAD:
                self.flow.resume_reading()

        def evict(self) -> None:
            """Make room for a connection that asks something."""
            counter.speaks(self)
            self.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            counter.leave(self, self._client)
            self._stop_timer()
            self._stop_reader_timer()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._start_reader_timer()

        def resume_writing(self) -> None:
            self._stop_reader_timer()
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            """Called while h11's error is handled: its hint tells 431 from 400."""
            error = sys.exc_info()[1]
            status = getattr(error, "error_status_hint", 400)
            if status == 431:
                self._refuse(ApiError(431, "the header fields are too large"))
            else:
                self._refuse(ApiError(400, "the request is not valid HTTP", code="invalid_http"))

        def _watch_receipt(self) -> None:
            """Head, then body, then nothing to wait for."""
            state = self.conn.their_state
            if state is not h11.IDLE:
                counter.speaks(self)
            if state is h11.SEND_BODY:
                if not self._receives_body:
                    # The application gives up first where it reads the body, and says why.
                    self._start_timer(limits.body_seconds + LINGER_SECONDS)
                    self._receives_body = True
            elif state is not h11.IDLE:
                self._stop_timer()

        def _start_timer(self, seconds: float) -> None:
            self._stop_timer()
            self._receipt_timer = self.loop.call_later(seconds, self._late)

        def _stop_timer(self) -> None:
            self._receives_body = False
            if self._receipt_timer is not None:
                self._receipt_timer.cancel()
                self._receipt_timer = None

        def _late(self) -> None:
            self._receipt_timer = None
            if self.transport.is_closing():
                return
            if self._receives_body:
                self.transport.close()
            elif self.conn.our_state is h11.IDLE:
                self._refuse(ApiError(408, "the request head did not arrive in time"))

        def _start_reader_timer(self) -> None:
            self._unread = self.transport.get_write_buffer_size()
            self._reader_timer = self.loop.call_later(limits.reader_seconds, self._reader_late)

        def _stop_reader_timer(self) -> None:
            if self._reader_timer is not None:
                self._reader_timer.cancel()
                self._reader_timer = None

        def _reader_late(self) -> None:
            """Give up on a reader that hardly moves; one that is merely slow gets more time."""
            taken = self._unread - self.transport.get_write_buffer_size()
            if taken < SLOWEST_READER * limits.reader_seconds:
                self.transport.abort()
            else:
                self._start_reader_timer()

        def _refuse(self, error: ApiError) -> None:
            """Answer below the application and close."""
            self._refused = True
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.close()
                return
            refused(error)
            body = msgspec.json.encode(error.body())
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                output = self.conn.send(event)
                if output:
                    self.transport.write(output)
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)

    return LimitedH11Protocol
