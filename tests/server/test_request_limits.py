"""Requests on every route: no body where none belongs, deadlines, chunks, pipelines."""

from __future__ import annotations

import json
import socket

import h11
import pytest

from server.http_protocol import BoundedConnection
from tests.server.live_server import LiveServer
from tests.server.raw_http import get, status

REQUEST_SECONDS = 0.5  # some tests wait for their end


@pytest.mark.parametrize("path", ["/health/live", "/metrics", "/v1/models", "/nowhere"])
def test_v13_get_requests_have_no_body(server: LiveServer, path: str) -> None:
    """A body that no route reads had neither a size nor a deadline."""
    for lines, body in (
        (["Content-Length: 1000000000"], b"x"),
        (["Transfer-Encoding: chunked"], b"1\r\nx\r\n"),
    ):
        answer = server.send(get(path, *lines, body=body))
        assert status(answer) == 400
        assert b"connection: close" in answer.lower()
        assert b"unexpected_body" in answer
    assert status(server.send(get(path, "Content-Length: 0", "Connection: close"))) in (200, 404)


@pytest.mark.parametrize("path", ["/health/live", "/metrics", "/v1/models", "/nowhere"])
def test_v20_heads_have_a_deadline_on_every_route(server: LiveServer, path: str) -> None:
    assert (
        status(server.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Slow: ".encode())) == 408
    )


@pytest.mark.parametrize("path", ["/nowhere", "/health/live", "/metrics"])
def test_v20_an_answer_before_the_body_ends_the_connection(server: LiveServer, path: str) -> None:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: 1000000\r\n\r\n"
    )
    answer = server.send(head.encode())
    assert status(answer) in (404, 405)
    assert b"connection: close" in answer.lower()


def test_v20_a_deadline_ends_with_the_request(server: LiveServer) -> None:
    """A slow answer is no slow request: `body_seconds` of this server is half a second."""
    server.call(server.engine.running.clear)
    timer = server.loop.call_later  # lets generation go on after twice that time
    server.call(lambda: timer(1.2, server.engine.running.set))
    assert server.post(prompt="a", max_tokens=3).status_code == 200


def crumbs(count: int, size: int) -> BoundedConnection:
    """A parser that was given a body in many chunks."""
    parser = BoundedConnection(h11.SERVER, 2**15)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    parser.receive_data(head + (f"{size:x}\r\n".encode() + b"x" * size + b"\r\n") * count)
    return parser


def drain(parser: BoundedConnection) -> None:
    while parser.next_event() is not h11.NEED_DATA:
        pass


def test_v38_floods_of_tiny_chunks_are_refused(server: LiveServer) -> None:
    with pytest.raises(h11.RemoteProtocolError):
        drain(crumbs(count=5000, size=1))
    drain(crumbs(count=1000, size=1))
    drain(crumbs(count=5000, size=100))
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    assert status(server.send(head + b"1\r\n \r\n" * 5000)) == 400


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
def test_b71_a_pipelined_request_does_not_hide_a_disconnect(
    server: LiveServer, streamed: bool
) -> None:
    """Reading paused at the second request, so the end of the connection went unnoticed."""
    server.call(server.engine.running.clear)
    body = json.dumps({"prompt": "a", "max_tokens": 200, "stream": streamed}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body + get("/health/live"))
        server.until(lambda: len(server.engine.live) == 1)
    server.until(lambda: not server.engine.live)


def test_pipelined_requests_are_answered_in_order(server: LiveServer) -> None:
    raw = get("/version") + get("/v1/models") + get("/health/live", "Connection: close")
    answer = server.send(raw)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.index(b'"version"') < answer.index(b'"owned_by"') < answer.index(b'"alive"')
