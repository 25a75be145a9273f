"""The page that Prometheus scrapes, in its classic text format or as OpenMetrics."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

CACHE_SECONDS = 1.0  # scrapes closer together share one rendering
TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


@dataclass(slots=True)
class _Rendering:
    page: bytes = b""
    made: float = float("-inf")


class MetricsPage:
    """Renders the registry off the event loop, one rendering at a time and at most one a second."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._metrics = _WithoutCreated(registry)
        self._lock = threading.Lock()
        self._renderings = {TEXT: _Rendering(), OPENMETRICS: _Rendering()}
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
        return await asyncio.to_thread(self._render, kind), kind

    def _render(self, kind: str) -> bytes:
        with self._lock:
            rendering = self._renderings[kind]
            begun = time.monotonic()
            if begun - rendering.made >= CACHE_SECONDS:
                generate = generate_openmetrics if kind == OPENMETRICS else generate_latest
                rendering.page = generate(self._metrics)
                rendering.made = time.monotonic()
                self._seconds.set(rendering.made - begun)
            return rendering.page


def accepts_openmetrics(accept: str) -> bool:
    """Whether an Accept header names OpenMetrics without refusing it (a quality of 0)."""
    for part in accept.split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if kind == "application/openmetrics-text":
            quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
            return quality.strip("0.") != ""
    return False


class _WithoutCreated(Collector):
    """A registry without the library's `_created` series, a quarter of the page that none asks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric
