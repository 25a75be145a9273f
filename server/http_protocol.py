"""uvicorn's h11 protocol with the limits that it lacks: connections, slow writers and readers.

h11 itself bounds the bytes of a head (`h11_max_incomplete_event_size`).
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import ApiError

LINGER_SECONDS = 1.0  # for a refused client to finish sending and read why


def limited_protocol(
    max_connections: int, header_seconds: float, reader_seconds: float
) -> type[H11Protocol]:
    """A protocol class with these limits, to give to `uvicorn.Config(http=...)`."""

    class LimitedH11Protocol(H11Protocol):
        """One connection. A head must be complete `header_seconds` after its first byte.

        A reader that takes nothing for `reader_seconds` loses its connection. Closing alone would
        wait until all is written, that is for as long as the reader likes.
        """

        _head_timer: asyncio.TimerHandle | None = None
        _reader_timer: asyncio.TimerHandle | None = None
        _unread = 0  # bytes in the write buffer when the timer was started
        _refused = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.abort()
                return
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return  # read and dropped, so that our answer is not lost to a reset
            between = self.cycle is None or self.cycle.response_complete
            if between and self._head_timer is None:
                self._start_timer()
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_timer()

        def connection_lost(self, exc: Exception | None) -> None:
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

        def _start_timer(self) -> None:
            self._head_timer = self.loop.call_later(header_seconds, self._head_late)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _start_reader_timer(self) -> None:
            self._unread = self.transport.get_write_buffer_size()
            self._reader_timer = self.loop.call_later(reader_seconds, self._reader_late)

        def _stop_reader_timer(self) -> None:
            if self._reader_timer is not None:
                self._reader_timer.cancel()
                self._reader_timer = None

        def _reader_late(self) -> None:
            """Give up on a reader that has not moved; one that is merely slow gets more time."""
            if self.transport.get_write_buffer_size() < self._unread:
                self._start_reader_timer()
            else:
                self.transport.abort()

        def _head_late(self) -> None:
            self._head_timer = None
            if not self.transport.is_closing() and self.conn.our_state is h11.IDLE:
                self._refuse(ApiError(408, "the request head did not arrive in time"))

        def _refuse(self, error: ApiError) -> None:
            """Answer below the application and close."""
            self._refused = True
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.close()
                return
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
