"""What every route needs: engine, tokenizer, settings, metrics; and the work they share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from engine.client import Engine
from engine.errors import EngineUnavailableError
from engine.tokenizer import Tokenizer
from server.config import ServerConfig
from server.errors import ApiError
from server.metrics import ServerMetrics
from server.protocol import parse_body, unknown_fields

TOKENIZER_THREADS = 2

Body = TypeVar("Body", bound=BaseModel)


class Service:
    """One server's collaborators. Made once, handed to every router."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        config: ServerConfig,
        dropped_lines: Callable[[], int] = int,
    ) -> None:
        """`dropped_lines` tells how many log lines of this process were lost."""
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.metrics = ServerMetrics(engine, config.model_name, dropped_lines)
        self.started = int(time.time())
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")

    async def parse(self, kind: type[Body], request: Request) -> Body:
        """Read and validate a request's body; count the fields that nobody knows.

        Raises:
            ApiError: 400, 408, 413 or 404 for a model that is not served here.
        """
        body = parse_body(kind, await request.body())
        self.metrics.count_unknown_fields(len(unknown_fields(body)))
        model: Any = getattr(body, "model", None)
        if model is not None and model != self.config.model_name:
            raise ApiError(404, "no such model", param="model", code="model_not_found")
        return body

    def require_ready(self) -> None:
        """Refuse work early while the engine takes none; raises EngineUnavailableError."""
        if self.engine.state != "ready":
            raise EngineUnavailableError(f"the engine is {self.engine.state}")

    async def in_thread(self, work: Any, *args: Any) -> Any:
        """Run tokenising and template work off the event loop; a few threads, so it is bounded."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def deadline(self, wanted: float | None) -> float:
        """When a request that comes now must have ended, in time.monotonic() seconds.

        Args:
            wanted: seconds that its client gives it; None: as many as the server allows.
        """
        most = self.config.max_request_seconds
        return time.monotonic() + (most if wanted is None else min(wanted, most))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
