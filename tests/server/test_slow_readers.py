"""Clients that read slowly or not at all, B81 and F17: bounded, then ended; nobody else waits."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import httpx
import msgspec

from server.event_stream import EventStream, Patience
from tests.server.live_server import LiveServer, live_server
from tests.server.raw_http import raw_post


def write(patience: Patience, chunks: list[bytes]) -> list[str | None]:
    """Stream to a reader that takes nothing; the reasons it was closed for."""
    reasons: list[str | None] = []

    async def source() -> Any:
        for chunk in chunks:
            yield chunk

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def run() -> None:
        async with asyncio.timeout(20):
            await EventStream(source(), reasons.append, patience)({}, receive, send)

    asyncio.run(run())
    return reasons


def test_f17_unread_output_is_bounded_in_bytes() -> None:
    """Long before the grace is over."""
    unread = iter([10, 100, 101])
    patience = Patience(seconds=3600, unread=lambda: next(unread), max_unread=100)
    assert write(patience, [b"a"]) == ["slow_consumer"]
    assert next(unread, None) is None


def test_f17_the_grace_is_bounded_too() -> None:
    patience = Patience(seconds=0.05, unread=lambda: 0, max_unread=100)
    assert write(patience, [b"a"]) == ["slow_consumer"]


def slow_connection(server: LiveServer) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", server.port))
    return connection


def test_b81_f17_readers_that_crawl_or_stop_are_dropped_for_their_bytes(tmp_path: Path) -> None:
    """Their pages come free though the grace is an hour, and others get their answers meanwhile."""
    limits: dict[str, Any] = {"slow_reader_seconds": 3600, "max_unread_bytes": 200_000}
    with live_server(tmp_path, **limits) as server, contextlib.ExitStack() as stack:
        info = server.engine.info
        server.engine.info = msgspec.structs.replace(info, max_model_len=10**6)
        body = {"prompt": "a", "max_tokens": 900_000, "stream": True, "ignore_eos": True}
        readers = [stack.enter_context(slow_connection(server)) for _ in range(3)]
        for reader in readers:
            reader.sendall(raw_post("/v1/completions", **body, logprobs=20))
        server.until(lambda: len(server.engine.live) == 3)
        assert server.post(prompt="b", max_tokens=3).status_code == 200

        def crawl() -> bool:
            readers[0].recv(1)
            readers[1].recv(1)
            return not server.engine.live

        server.until(crawl, seconds=60)
        name = 'requests_finished_total{model_name="toy",reason="slow_consumer"} 3.0'
        server.until(lambda: name in httpx.get(server.url + "/metrics").text)


def test_b81_a_whole_answer_is_no_hostage_of_a_crawling_reader(tmp_path: Path) -> None:
    """Any progress used to be enough: 16 MiB at a byte a second is half a year."""
    limits: dict[str, Any] = {"slow_reader_seconds": 1.5, "max_body_bytes": 2**25}
    with live_server(tmp_path, max_connections=1, **limits) as server:
        info = server.engine.info
        server.engine.info = msgspec.structs.replace(info, max_model_len=10**7)
        with slow_connection(server) as reader:
            reader.sendall(raw_post("/detokenize", tokens=[70] * 5_000_000))
            assert reader.recv(12) == b"HTTP/1.1 200"
            assert httpx.get(server.url + "/version").status_code == 503

            def others_get_in() -> bool:
                reader.recv(1)
                return httpx.get(server.url + "/version").status_code == 200

            server.until(others_get_in)
