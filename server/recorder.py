"""The layer around everything: it sees a request come and its answer end, and tells who asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError
from server.request_record import METHODS, OTHER, UNMATCHED, RequestRecord

Observer = Callable[[RequestRecord], None]


class Recorder:
    """Makes a record for every HTTP request and hands it to the observers when it has ended."""

    def __init__(self, app: ASGIApp, observers: Sequence[Observer]) -> None:
        """Observers are called on the event loop, in order; they must not wait."""
        self._app = app
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        record = RequestRecord(
            method if method in METHODS else OTHER, trace_headers=_trace_headers(scope)
        )
        scope.setdefault("state", {})["record"] = record

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            record.route = getattr(scope.get("route"), "path", UNMATCHED)
            self._tell(record)

    def refused(self, error: ApiError) -> None:
        """Account an answer that was given before there was a request that one could read."""
        self._tell(RequestRecord(OTHER, status=error.status, error_code=error.reason))

    def _tell(self, record: RequestRecord) -> None:
        for observe in self._observers:
            observe(record)


def _trace_headers(scope: Scope) -> dict[str, str]:
    """Those of W3C's trace context, as they came; whoever reads them checks them."""
    return {
        name.decode(): value.decode("latin-1")
        for name, value in scope["headers"]
        if name in (b"traceparent", b"tracestate")
    }
