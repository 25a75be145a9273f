"""Scrapes of /metrics: the formats of the page, and scrapes that come close together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.registry import Collector

from server import metrics_page
from tests.server.live_server import LiveServer, live_server

pytestmark = pytest.mark.usefixtures("fresh_pages")


def test_openmetrics_carries_the_ids_of_requests(server: LiveServer) -> None:
    """The classic format has no place for them."""
    answer = server.post(prompt="abc", max_tokens=5, ignore_eos=True)
    accept = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5"

    def exemplars() -> set[str]:
        page = httpx.get(server.url + "/metrics", headers={"accept": accept})
        assert page.headers["content-type"].startswith("application/openmetrics-text")
        families = list(openmetrics_families(page.text))  # type: ignore[no-untyped-call]
        assert len({family.name for family in families}) == len(families)
        return {
            family.name
            for family in families
            for sample in family.samples
            if sample.exemplar
            and sample.exemplar.labels == {"request_id": answer.headers["x-request-id"]}
        }

    names = """time_to_first_token_seconds inter_token_latency_seconds request_queue_seconds
    request_prefill_seconds request_decode_seconds request_duration_seconds attended_fraction
    http_request_duration_seconds""".split()
    server.until(lambda: exemplars() >= {f"rtpurbo_{name}" for name in names})
    assert " # {" not in httpx.get(server.url + "/metrics").text


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("application/openmetrics-text;q=0, text/plain", "text/plain"),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text"),
    ],
    ids=["none", "any", "refused", "wanted"],
)
def test_the_format_is_the_one_that_was_asked_for(
    server: LiveServer, accept: str, kind: str
) -> None:
    page = httpx.get(server.url + "/metrics", headers={"accept": accept})
    assert page.headers["content-type"].startswith(kind)


def test_f19_scrapes_close_together_share_one_page(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_page, "CACHE_SECONDS", 3600.0)
    pages = {httpx.get(server.url + "/metrics").text for _ in range(5)}
    assert len(pages) == 1


def test_f19_a_storm_of_scrapes_is_one_rendering_and_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a page takes its time, others are answered, and scrapers share what comes of it."""
    begun, go_on, renderings = threading.Event(), threading.Event(), []

    def slow(registry: Collector, **options: Any) -> bytes:
        renderings.append(registry)
        begun.set()
        assert go_on.wait(30)
        return generate_latest(registry, **options)

    monkeypatch.setattr(metrics_page, "generate_latest", slow)
    monkeypatch.setattr(metrics_page, "CACHE_SECONDS", 3600.0)
    with live_server(tmp_path) as server, ThreadPoolExecutor(20) as pool:
        url = server.url + "/metrics"
        scrapes = [pool.submit(httpx.get, url, timeout=60) for _ in range(20)]
        assert begun.wait(30)
        assert server.post(prompt="a", max_tokens=5).status_code == 200
        assert httpx.get(server.url + "/health/live").status_code == 200
        assert not any(scrape.done() for scrape in scrapes)
        go_on.set()
        assert len({scrape.result().text for scrape in scrapes}) == 1
    assert len(renderings) == 1
