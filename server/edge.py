"""The outermost layer: what a request must look like before any route sees it.

Pure ASGI over raw headers and the raw path, so that nothing is decided on what a parser made of
them (CVE-2026-48710: a Host header that changed the path which authorisation looked at).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import KeyRing
from server.body_budget import BodyBudget
from server.config import ServerConfig
from server.errors import ApiError, invalid, to_api_error
from server.request_record import record_of

logger = logging.getLogger(__name__)

_HOST = re.compile(rb"[A-Za-z0-9._\-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-]{1,128}")
_MAX_PATH = 2048  # bytes, query included
_CLOSE = (b"connection", b"close")


class Edge:
    """Request id, header and body rules, keys, and the last resort for exceptions."""

    def __init__(self, app: ASGIApp, config: ServerConfig, keys: KeyRing) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._held = BodyBudget(config.max_held_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        body = _Body(receive, self._config.max_body_bytes, self._config.body_seconds, self._held)
        answer = _Answer(send, request_id, body)
        try:
            self._check_head(scope)
            self._keys.check(scope)
            self._check_body_head(scope, body)
            await self._app(scope, body.receive, answer.send)
        except Exception as error:  # whatever happens, a client gets exactly one answer
            await self._answer_exception(error, request_id, answer, scope, receive)
        finally:
            self._held.give_back(body.received)

    async def _answer_exception(
        self, error: Exception, request_id: str, answer: _Answer, scope: Scope, receive: Receive
    ) -> None:
        api_error = to_api_error(error)
        if api_error.status >= 500:
            logger.exception("request %s failed", request_id, exc_info=error)
            api_error.message = f"{api_error.message} (request {request_id})"
        record_of(scope).error_code = api_error.reason
        if not answer.started:
            await api_error.response()(scope, receive, answer.send)

    def _check_head(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in headers)
        if len(headers) > self._config.max_headers or size > self._config.max_header_bytes:
            raise ApiError(431, "the header fields are too many or too large")
        if len(scope["raw_path"]) + len(scope["query_string"]) > _MAX_PATH:
            raise ApiError(414, "the request target is too long")
        values = _by_name(headers)
        hosts = values.get(b"host", [])
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            raise invalid("the Host header is missing or malformed", code="invalid_host")
        if b"transfer-encoding" in values and b"content-length" in values:
            raise invalid("Transfer-Encoding and Content-Length exclude each other")
        if b"content-encoding" in values and values[b"content-encoding"] != [b"identity"]:
            raise ApiError(415, "Content-Encoding is not supported", code="unsupported_encoding")

    def _check_body_head(self, scope: Scope, body: _Body) -> None:
        """What can be said of a body before it is read; after the key, before `100 Continue`."""
        values = _by_name(scope["headers"])
        if scope["method"] != "POST":
            if b"transfer-encoding" in values or values.get(b"content-length", [b"0"]) != [b"0"]:
                raise invalid("only POST requests have a body", code="unexpected_body")
            body.complete = True
            return
        kind = values.get(b"content-type", [b""])[0].split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(
                415, "Content-Type must be application/json", code="unsupported_media_type"
            )
        length = values.get(b"content-length", [b"0"])[0]
        if length.isdigit() and int(length) > self._config.max_body_bytes:
            raise _too_large(self._config.max_body_bytes)


class _Body:
    """The body as it comes, under a byte cap and a deadline; both end with the body."""

    def __init__(self, receive: Receive, max_bytes: int, seconds: float, held: BodyBudget) -> None:
        self.complete = False
        self.received = 0  # bytes, all of them held
        self._receive = receive
        self._max_bytes = max_bytes
        self._deadline = time.monotonic() + seconds
        self._held = held

    async def receive(self) -> Message:
        """The ASGI channel of the application.

        Raises:
            ApiError: 408 or 413.
            QueueFullError: the bodies of other calls take too much memory.
        """
        if self.complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time") from None
        size = len(message.get("body", b""))
        if self.received + size > self._max_bytes:
            raise _too_large(self._max_bytes)
        self._held.take(size, self.received)
        self.received += size
        self.complete = not message.get("more_body", False)
        return message


class _Answer:
    """Adds the request id to the answer and remembers that one was started.

    A connection whose request was answered before all of it was read is closed: the rest, which
    has no bound, is not waited for.
    """

    def __init__(self, send: Send, request_id: str, body: _Body) -> None:
        self.started = False
        self._send = send
        self._header = (b"x-request-id", request_id.encode())
        self._body = body

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = [*message.get("headers", []), self._header]
            if not self._body.complete:
                headers.append(_CLOSE)
            message = {**message, "headers": headers}
        await self._send(message)


def _request_id(scope: Scope) -> str:
    """The client's X-Request-Id if it is a plain label, else ours; never a key to anything."""
    record = record_of(scope)
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            record.label = value.decode()
            return record.label
    return record.request_id


def _by_name(headers: list[tuple[bytes, bytes]]) -> dict[bytes, list[bytes]]:
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(value)
    return values


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes",
        code="body_too_large",
    )
