"""What every route needs: engine, tokenizer, settings, metrics; and the work they share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from engine.client import Engine
from engine.errors import EngineUnavailableError
from engine.tokenizer import Tokenizer
from server.config import ServerConfig
from server.errors import ApiError
from server.event_stream import answered
from server.job_threads import JobThreads
from server.large_body import SMALL_BODY
from server.metrics import ServerMetrics
from server.protocol import parse_body, parse_large_body, unknown_fields

SMALL_JOBS, LARGE_JOBS = 4, 2  # at once; a long text never delays a short one
LARGE_SIZE = 64 * 2**10  # characters or token ids

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
        self._small_jobs = JobThreads(SMALL_JOBS, config.job_seconds)
        self._large_jobs = JobThreads(LARGE_JOBS, config.job_seconds)

    async def parse(self, kind: type[Body], request: Request) -> Body:
        """Read and validate a request's body; count the fields that nobody knows.

        Raises:
            ApiError: 400, 408, 413 or 404 for a model that is not served here.
        """
        raw = await request.body()
        if len(raw) <= SMALL_BODY:
            body = parse_body(kind, raw)
        else:
            job = self.in_thread(parse_large_body, kind, raw, size=len(raw))
            body = await answered(job, request)
        self.metrics.count_unknown_fields(len(unknown_fields(body)))
        model: Any = getattr(body, "model", None)
        if model is not None and model != self.config.model_name:
            raise ApiError(404, "no such model", param="model", code="model_not_found")
        return body

    def require_ready(self) -> None:
        """Refuse work early while the engine takes none; raises EngineUnavailableError."""
        if self.engine.state != "ready":
            raise EngineUnavailableError(f"the engine is {self.engine.state}")

    async def in_thread(self, work: Any, *args: Any, size: int = 0) -> Any:
        """Run parsing, tokenising and template work off the event loop (`server.job_threads`).

        `size` is the number of characters or ids that it reads.
        """
        jobs = self._large_jobs if size > LARGE_SIZE else self._small_jobs
        return await jobs.run(work, *args)

    def deadline(self, wanted: float | None) -> float:
        """When a request that comes now must have ended, in time.monotonic() seconds.

        Args:
            wanted: seconds that its client gives it; None: as many as the server allows.
        """
        most = self.config.max_request_seconds
        return time.monotonic() + (most if wanted is None else min(wanted, most))
