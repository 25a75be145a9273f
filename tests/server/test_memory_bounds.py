"""F25: what the front end holds is bounded, the bounds add up, and a flood meets them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from engine.errors import QueueFullError
from server.auth import KeyRing
from server.body_budget import BodyBudget
from server.config import ServerConfig
from server.edge import Edge
from server.large_body import SMALL_BODY
from server.memory_bounds import front_end_bounds, render_bounds
from server.request_record import RequestRecord
from tests.engine.toy_info import toy_info

MIB = 2**20


def config_of(folder: Path, **settings: Any) -> ServerConfig:
    return ServerConfig.resolve({"model": folder, **settings}, folder)


def test_F25_bodies_of_calls_in_flight_share_a_budget() -> None:
    budget = BodyBudget(3 * SMALL_BODY)
    budget.take(10 * SMALL_BODY, 0)  # nothing else is held
    budget.take(SMALL_BODY, 0)  # small
    with pytest.raises(QueueFullError):
        budget.take(1, SMALL_BODY)
    assert budget.held == 11 * SMALL_BODY, "what was refused is not held"
    budget.give_back(10 * SMALL_BODY)
    budget.take(2 * SMALL_BODY, SMALL_BODY)
    with pytest.raises(QueueFullError):
        budget.take(2 * SMALL_BODY, 0)
    budget.give_back(3 * SMALL_BODY)
    assert budget.held == 0


def test_F25_the_bounds_follow_the_settings_and_add_up(tmp_path: Path) -> None:
    small = config_of(
        tmp_path,
        max_connections=16,
        max_body_bytes=MIB,
        max_held_body_bytes=2 * MIB,
        max_queued_requests=8,
        max_queued_prefill_tokens=10_000,
        max_num_seqs=4,
        max_batch_tokens=256,
        max_unread_bytes=65_536,
    )
    bounds = front_end_bounds(small, toy_info())
    assert sum(bounds.values()) < 25 * MIB, "a host with little memory can be served"
    default = front_end_bounds(config_of(tmp_path), toy_info())
    assert all(default[name] > value for name, value in bounds.items())
    shown = render_bounds(bounds)
    assert [line.split("  ")[-2].strip() for line in shown.splitlines()] == [*bounds, "together"]


class Client:
    """Calls an edge around an application that reads the body and then waits for `gate`."""

    def __init__(self, config: ServerConfig) -> None:
        self.gate = asyncio.Event()
        self.edge = Edge(self._app, config, KeyRing(tuple))

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        await self.gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def post(self, *chunks: int) -> int:
        """The status of the answer to a body that comes in chunks of so many bytes."""
        left, sent = list(chunks), []

        async def receive() -> Message:
            size = left.pop(0)
            return {"type": "http.request", "body": bytes(size), "more_body": bool(left)}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"host", b"a"), (b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": headers,
            "state": {"record": RequestRecord("POST")},
        }
        await self.edge(scope, receive, send)
        status: int = sent[0]["status"]
        return status


def test_F25_large_bodies_beside_large_ones_are_refused_and_small_ones_are_not(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        client = Client(config_of(tmp_path, max_held_body_bytes=MIB))
        large = asyncio.create_task(client.post(400_000, 400_000, 500_000))
        small = asyncio.create_task(client.post(1000))
        await asyncio.sleep(0)
        assert await client.post(200_000) == 429, "counted while the others run"
        assert await client.post(1000, 50_000, 50_000) == 429, "counted as it comes"
        client.gate.set()
        assert [await large, await small] == [200, 200]
        assert await client.post(200_000, 800_000, 400_000) == 200
        assert client.edge._held.held == 0

    asyncio.run(test())
