"""What a server and its engine hold of the machine: memory, descriptors, threads, pages."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, slots=True)
class Footprint:
    """One process at one moment."""

    rss_mib: float
    descriptors: int
    threads: int


def footprint(pid: int) -> Footprint:
    """Raises psutil.NoSuchProcess if it has ended."""
    process = psutil.Process(pid)
    return Footprint(process.memory_info().rss / 2**20, process.num_fds(), process.num_threads())


def engine_of(front_end: int) -> psutil.Process | None:
    """The engine process of a server, which is its only child; None while there is none."""
    for child in psutil.Process(front_end).children():
        if child.status() != psutil.STATUS_ZOMBIE:
            return child
    return None


def read_metrics(url: str) -> dict[str, float]:
    """Every sample of /metrics without its labels, summed over them."""
    page = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values
