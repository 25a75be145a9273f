"""What a scrape of /metrics costs under load, and what it does to streams: `python -m
benchmarks.scrape [MODEL]`.

Streams decode all the time. In turns of equal length nobody scrapes, or a scraper asks for either
format as often as the server renders (once a second each); gaps between chunks are kept apart by
turn. The scraper only measures: parsing is Prometheus' work and not done here. Ends with one JSON
line; seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.endless_stream import decode_forever
from benchmarks.hardware import describe_hardware
from benchmarks.server_process import serving
from engine.embedded import embedded_model_path

FORMATS = ("text/plain", "application/openmetrics-text;version=1.0.0")
RENDERED = re.compile(r"^rtpurbo_scrape_seconds\{[^}]*\} (\S+)$", re.MULTILINE)
PROMPT = "def main():\n"
PAUSE = 1.1  # seconds between two scrapes of a format; sooner would find the page in the cache


@dataclass(slots=True)
class Gathered:
    """What was seen so far; gaps by whether somebody scraped."""

    scraping: bool = False
    gaps: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    scrapes: list[float] = field(default_factory=list)
    renderings: list[float] = field(default_factory=list)
    page_bytes: int = 0

    def note_gap(self, seconds: float) -> None:
        self.gaps[self.scraping].append(seconds)


async def scrape(client: httpx.AsyncClient, gathered: Gathered) -> None:
    """Scrapes in turn of the formats, until cancelled."""
    for accept in itertools.cycle(FORMATS):
        begun = time.perf_counter()
        page = await client.get("/metrics", headers={"accept": accept})
        gathered.scrapes.append(time.perf_counter() - begun)
        gathered.page_bytes = max(gathered.page_bytes, len(page.content))
        gathered.renderings.extend(float(value) for value in RENDERED.findall(page.text))
        await asyncio.sleep(PAUSE / len(FORMATS))


async def measure(url: str, given: argparse.Namespace) -> Gathered:
    gathered = Gathered()
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        streams = [
            asyncio.create_task(decode_forever(client, PROMPT, gathered.note_gap))
            for _ in range(given.streams)
        ]
        await asyncio.sleep(given.seconds)  # all of them decode, and the caches are warm
        gathered.gaps[False].clear()
        for turn in range(2 * given.turns):
            gathered.scraping = turn % 2 == 1
            scraper = asyncio.create_task(scrape(client, gathered)) if turn % 2 else None
            await asyncio.sleep(given.seconds)
            if scraper is not None:
                scraper.cancel()
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return gathered


def figures(gathered: Gathered) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        ranked = sorted(values)
        return {
            "count": len(ranked),
            "median": round(statistics.median(ranked), 5),
            "p99": round(ranked[int(0.99 * (len(ranked) - 1))], 5),
            "largest": round(ranked[-1], 5),
        }

    return {
        "scrape": spread(gathered.scrapes),
        "rendering": spread(gathered.renderings[2:]),  # a page tells of the one before it
        "gap_without_scrapes": spread(gathered.gaps[False]),
        "gap_with_scrapes": spread(gathered.gaps[True]),
        "page_bytes": gathered.page_bytes,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a scrape of /metrics costs under load.")
    parser.add_argument("model", nargs="?", default=str(embedded_model_path()))
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a turn")
    parser.add_argument("--turns", type=int, default=3, help="of either kind")
    given = parser.parse_args(arguments)
    with serving(given.model, "--max-num-seqs", str(given.streams)) as server:
        gathered = asyncio.run(measure(server.url, given))
    work = {"streams": given.streams, "seconds": given.seconds, "turns": given.turns}
    print(json.dumps({"hardware": describe_hardware(), **work, **figures(gathered)}))


if __name__ == "__main__":
    main()
