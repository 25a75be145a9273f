"""How many connections there may be: in all, per client, and below the limit of descriptors."""

from __future__ import annotations

import logging
import resource
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import ConfigError
from server.errors import ApiError

logger = logging.getLogger(__name__)

RESERVED = 16  # connections above the cap that may ask for health and metrics only
BACKLOG = 256  # connections that the kernel holds; all may be accepted before any is closed
SPARE_DESCRIPTORS = 64 + BACKLOG  # for the listener, the engine's pipes and sockets, and files
_CLOSE = (b"connection", b"close")
_WARNING_SECONDS = 60.0  # between two lines about the same


class Evictable(Protocol):
    """A connection that can be told to make room."""

    def evict(self) -> None: ...


def affordable_connections(wanted: int) -> int:
    """Connections that the descriptors of this process suffice for, at most `wanted`.

    Raises the soft limit as far as needed and allowed. Running out would be worse than refusing:
    no health probe could be accepted, and no engine be started again.

    Raises:
        ConfigError: there is room for none.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    room = soft - RESERVED - SPARE_DESCRIPTORS
    if room < 1:
        raise ConfigError(
            f"max_connections: the limit of {soft} open files leaves room for none; "
            f"it must be at least {RESERVED + SPARE_DESCRIPTORS + 1}"
        )
    logger.warning("max_connections is %d, not %d: only %d files may be open", room, wanted, soft)
    return room


class ConnectionCounter:
    """Admits connections, and remembers those above the cap that have not asked anything yet.

    A probe asks at once, whereas whoever uses up connections says nothing for as long as it can:
    so the oldest silent one above the cap makes room for the newest.
    """

    def __init__(
        self, most: int, per_client: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`per_client` 0 is no limit; behind a proxy all clients have one address."""
        self._most = most
        self._per_client = per_client
        self._clock = clock
        self._open = 0
        self._of_client: Counter[str] = Counter()
        self._silent: dict[Evictable, None] = {}  # in the order of their arrival
        self._warned: float | None = None

    def is_welcome(self, client: str) -> bool:
        """Count a connection in; whether it may be kept. `leave` must follow in every case."""
        self._open += 1
        self._of_client[client] += 1
        if not self._per_client or self._of_client[client] <= self._per_client:
            return True
        self._warn("a client has more than %d connections", self._per_client)
        return False

    @property
    def is_full(self) -> bool:
        """Whether the newest connection is one above the cap."""
        return self._open > self._most

    def reserve(self, connection: Evictable) -> None:
        """Keep a connection above the cap for a probe, in place of the oldest silent one."""
        self._warn("more than %d connections; others may ask for health only", self._most)
        self._silent[connection] = None
        if self._open > self._most + RESERVED:
            next(iter(self._silent)).evict()

    def speaks(self, connection: Evictable) -> None:
        """The connection has sent a request: it will end by itself."""
        self._silent.pop(connection, None)

    def leave(self, connection: Evictable, client: str) -> None:
        """Count a connection out."""
        self._open -= 1
        self._silent.pop(connection, None)
        self._of_client[client] -= 1
        if not self._of_client[client]:
            del self._of_client[client]

    def _warn(self, message: str, number: int) -> None:
        now = self._clock()
        if self._warned is None or now - self._warned >= _WARNING_SECONDS:
            self._warned = now
            logger.warning(message, number)


class ProbesOnly:
    """What a connection above the cap is served by: one answer, and only to a probe."""

    def __init__(self, app: ASGIApp, paths: Collection[str]) -> None:
        self._app = app
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [pair for pair in message.get("headers", []) if pair != _CLOSE]
                message = {**message, "headers": [*others, _CLOSE]}
            await send(message)

        if scope["path"] in self._paths:
            await self._app(scope, receive, closing)
            return
        full = ApiError(
            503,
            "there are too many connections",
            code="too_many_connections",
            headers={"Retry-After": "1"},
        )
        await full.response()(scope, receive, closing)
