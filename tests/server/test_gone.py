"""Clients that leave at any stage, B71 to B75: nobody else waits; and clocks that jump."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.tokenizer import Tokenizer
from server.app import create_app
from server.config import ServerConfig
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import LiveServer, make_tokenizer
from tests.server.raw_http import raw_post


def gone(server: LiveServer) -> float:
    """Requests whose clients left before an answer began."""
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    found = [line for line in lines if "http_requests_total" in line and 'status="499"' in line]
    return sum(float(line.split()[-1]) for line in found)


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Any:
    """No client that leaves may leave a traceback behind."""
    with caplog.at_level(logging.WARNING):
        yield
    assert not [record for record in caplog.records if record.exc_info], caplog.text


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("sent", ["half", "chunked"])
def test_b71_while_the_body_is_read(server: LiveServer, sent: str) -> None:
    before, submitted = gone(server), len(server.engine.submitted)
    raw = raw_post("/v1/completions", prompt="a", n=8)[:-5]
    if sent == "chunked":
        head = raw.split(b"\r\n\r\n")[0].replace(
            b"Content-Length: 22", b"Transfer-Encoding: chunked"
        )
        raw = head + b"\r\n\r\n5\r\n{"
    server.send(raw, close=True)
    server.until(lambda: gone(server) == before + 1)
    assert len(server.engine.submitted) == submitted


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_b71_while_the_prompt_is_tokenised(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, path: str, streamed: bool
) -> None:
    begun, release = threading.Event(), threading.Event()
    encode = Tokenizer.encode_at_most

    def slow(self: Tokenizer, limit: int, text: str, **options: Any) -> Any:
        begun.set()
        release.wait(20)
        return encode(self, limit, text, **options)

    monkeypatch.setattr(Tokenizer, "encode_at_most", slow)
    before, submitted = gone(server), len(server.engine.submitted)
    prompt = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    address = ("127.0.0.1", server.port)
    with socket.create_connection(address) as connection:
        connection.sendall(raw_post(path, **prompt, n=8, stream=streamed))
        assert begun.wait(20)
    server.until(lambda: gone(server) == before + 1)
    release.set()
    assert server.post(prompt="a", max_tokens=1).status_code == 200
    assert len(server.engine.submitted) == submitted + 1, "only the last one got to the engine"


@pytest.mark.usefixtures("quiet")
def test_b71_while_a_large_body_is_parsed(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, release = threading.Event(), threading.Event()

    def slow(*_: Any) -> Any:
        begun.set()
        release.wait(20)

    monkeypatch.setattr("server.service.parse_large_body", slow)
    before = gone(server)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(raw_post("/v1/completions", prompt="a" * 100_000))
        assert begun.wait(20)
    server.until(lambda: gone(server) == before + 1)
    release.set()


@pytest.mark.usefixtures("quiet")
def test_b71_between_the_last_token_and_done(tmp_path: Path) -> None:
    """The request counts as what it was, finished, and once."""
    tokenizer = make_tokenizer(tmp_path)
    config = ServerConfig.resolve({"model": tmp_path, "model_name": "toy"}, tmp_path)
    engine = FakeEngine(tokenizer)

    async def test() -> str:
        app = create_app(engine, tokenizer, config)
        last, sent = asyncio.Event(), b""
        messages = [{"type": "http.request", "body": b'{"prompt": "a", "stream": true}'}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await last.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal sent
            sent += message.get("body", b"")
            if b'"finish_reason":"length"' in sent:
                last.set()
                await asyncio.sleep(30)  # a write to a connection that is gone

        await app(scope("POST", "/v1/completions"), receive, send)
        assert not sent.endswith(b"[DONE]\n\n")
        page = b""

        async def read(message: Any) -> None:
            nonlocal page
            page += message.get("body", b"")

        await app(scope("GET", "/metrics"), receive, read)
        return page.decode()

    async def bounded() -> str:
        async with asyncio.timeout(20):
            return await test()

    page = asyncio.run(bounded())
    assert not engine.live
    assert 'requests_finished_total{model_name="toy",reason="length"} 1.0' in page
    assert 'requests_finished_total{model_name="toy",reason="abort"} 0.0' in page


def scope(method: str, path: str) -> dict[str, Any]:
    headers = [(b"host", b"x"), (b"content-type", b"application/json")]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }


def test_f18_wall_clock_jumps_change_nothing(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only `created` shows them."""
    import time

    now = time.time
    for jump in (86_400.0, -86_400.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
        answer = server.post(prompt="a", max_tokens=3, timeout_seconds=20)
        assert answer.status_code == 200
        assert abs(answer.json()["created"] - now() - jump) < 60
        streamed = server.post(prompt="a", max_tokens=3, timeout_seconds=20, stream=True)
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert httpx.get(server.url + "/health/ready").status_code == 200
