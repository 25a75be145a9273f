"""One running server per test module, brought back to its baseline after every test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from server import metrics_page
from tests.server.live_server import LiveServer, live_server


@pytest.fixture(scope="module")
def shared_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A module whose tests wait for the end of a deadline says how long requests may take.

    That of the others is long: on a busy machine a large body takes its time.
    """
    seconds: float = getattr(request.module, "REQUEST_SECONDS", 60.0)
    settings: dict[str, Any] = {
        "body_seconds": seconds,
        "header_seconds": seconds,
        "keep_alive_seconds": 0.1,
    }
    with live_server(tmp_path_factory.mktemp("model"), **settings) as server:
        yield server


@pytest.fixture
def server(shared_server: LiveServer) -> Iterator[LiveServer]:
    """The module's server; afterwards it must serve, and nothing may be left running."""
    yield shared_server
    engine = shared_server.engine
    shared_server.call(engine.running.set)
    shared_server.until(lambda: not engine.live)
    engine.state, engine.silence, engine.queue_limit = "ready", 0.0, 64
    engine.minus_infinity = False
    engine.trouble, engine.step_allowance = None, 0.0
    engine.scripts.clear()
    good = shared_server.post(prompt="after", max_tokens=2, temperature=0)
    assert good.status_code == 200, good.text
    assert not engine.live


@pytest.fixture
def fresh_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scrape renders, so that a test never starts from the page of the one before it."""
    monkeypatch.setattr(metrics_page, "CACHE_SECONDS", 0.0)
