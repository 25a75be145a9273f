"""The page that Prometheus scrapes, in its classic text format or as OpenMetrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

CACHE_SECONDS = 1.0  # scrapes closer together share one rendering
TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


@dataclass(slots=True)
class _Format:
    """The newest page in one format, and the rendering of the next while there is one."""

    page: bytes = b""
    made: float = float("-inf")  # time.monotonic() seconds
    rendering: asyncio.Task[None] | None = None


class MetricsPage:
    """Renders the registry off the event loop, one rendering at a time and at most one a second.

    Scrapes that come while a page is rendered wait for that one: a storm of them costs one thread.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._metrics = _WithoutCreated(registry)
        self._formats = {TEXT: _Format(), OPENMETRICS: _Format()}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._seconds = Gauge(
            "rtpurbo_scrape_seconds",
            "Time that the rendering of this page took the time before, seconds.",
            ["model_name"],
            registry=registry,
        ).labels(model_name)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its media type, the one that `accept` names; exemplars come with
        OpenMetrics only."""
        kind = OPENMETRICS if accepts_openmetrics(accept) else TEXT
        wanted = self._formats[kind]
        if time.monotonic() - wanted.made >= CACHE_SECONDS:
            if wanted.rendering is None:
                wanted.rendering = asyncio.create_task(self._renew(kind))
            await asyncio.shield(wanted.rendering)  # a scraper that goes away stops no other one
        return wanted.page, kind

    async def _renew(self, kind: str) -> None:
        wanted = self._formats[kind]
        generate = generate_openmetrics if kind == OPENMETRICS else generate_latest
        begun = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            wanted.page = await loop.run_in_executor(
                self._thread,
                # Our names need no escaping; this way the library does not look at every letter.
                lambda: generate(self._metrics, escaping=ALLOWUTF8),
            )
            wanted.made = time.monotonic()
            self._seconds.set(wanted.made - begun)
        finally:
            wanted.rendering = None


def accepts_openmetrics(accept: str) -> bool:
    """Whether an Accept header names OpenMetrics without refusing it (a quality of 0)."""
    for part in accept.split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if kind == "application/openmetrics-text":
            quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
            return quality.strip("0.") != ""
    return False


class _WithoutCreated(Collector):
    """A registry without the library's `_created` series, which nobody asks for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric
