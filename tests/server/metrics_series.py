"""Series of the live server, as a scraper reads them."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.server.live_server import LiveServer


def scrape(server: LiveServer) -> dict[str, object]:
    """Families of the page by name."""
    page = httpx.get(server.url + "/metrics", timeout=20)
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {family.name: family for family in text_string_to_metric_families(page.text)}


def value(server: LiveServer, name: str, **labels: str) -> float:
    """The first sample with this name and these labels, among others; 0 where there is none."""
    families = scrape(server)
    for family in families.values():
        for sample in family.samples:  # type: ignore[attr-defined]  # the parser is untyped
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return 0.0
