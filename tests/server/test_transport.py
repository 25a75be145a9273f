"""Rows B53 to B69 of the table of bad inputs: headers, bodies and connections, over raw sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

import httpx
import psutil
import pytest

from tests.server.live_server import LiveServer
from tests.server.test_bad_inputs import assert_refused

REQUEST_SECONDS = 0.5  # some tests wait for their end
GOOD = b'{"prompt": "a", "max_tokens": 1}'


def request(
    *lines: str, host: str | None = "localhost", method: str = "POST", body: bytes = GOOD
) -> bytes:
    """A raw request; `Connection: close`, so that reading to the end is the answer."""
    head = [f"{method} /v1/completions HTTP/1.1", "Connection: close", *lines]
    if host is not None:
        head.append(f"Host: {host}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def framed(body: bytes = GOOD) -> tuple[str, str]:
    return "Content-Type: application/json", f"Content-Length: {len(body)}"


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> dict[str, object]:
    error: dict[str, object] = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
    return error


def test_a_plain_raw_request_works(server: LiveServer) -> None:
    assert status(server.send(request(*framed()))) == 200


def test_b53_b69_client_request_ids_are_labels_only(server: LiveServer) -> None:
    """V10: two live requests with one id do not meet; odd ids are replaced, never reflected."""
    server.call(server.engine.running.clear)
    answers: list[httpx.Response] = []

    def call() -> None:
        headers = {"x-request-id": "same"}
        body = {"prompt": "a", "max_tokens": 3, "temperature": 0}
        url = server.url + "/v1/completions"
        answers.append(httpx.post(url, json=body, headers=headers, timeout=20))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    server.until(lambda: len(server.engine.live) == 2)
    server.call(server.engine.running.set)
    for thread in threads:
        thread.join()
    assert {answer.headers["x-request-id"] for answer in answers} == {"same"}
    assert len({answer.json()["id"] for answer in answers}) == 2
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    for odd in ("x" * 1000, "a b", 'a"b', "\u00e9"):
        answer = server.send(request(*framed(), f"X-Request-Id: {odd}"))
        assert status(answer) == 200
        assert odd.encode("latin-1") not in answer


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "gzip, identity"])
def test_b55_content_encodings(server: LiveServer, coding: str) -> None:
    headers = {"content-encoding": coding, "content-type": "application/json"}
    answer = httpx.post(server.url + "/v1/completions", content=GOOD, headers=headers)
    assert_refused(answer, status=415)


@pytest.mark.parametrize(
    "kind", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_v18_other_media_types(server: LiveServer, kind: str) -> None:
    answer = httpx.post(
        server.url + "/v1/completions", content=GOOD, headers={"content-type": kind}
    )
    assert_refused(answer, status=415)


def test_b57_a_body_that_never_comes(server: LiveServer) -> None:
    answer = server.send(request("Content-Type: application/json", "Content-Length: 1000"))
    assert status(answer) == 408
    assert b"connection: close" in answer.lower()


def test_v20_a_head_that_never_ends(server: LiveServer) -> None:
    answer = server.send(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    assert status(answer) == 408


def test_v20_a_connection_that_says_nothing(server: LiveServer) -> None:
    assert status(server.send(b"")) == 408


@pytest.mark.parametrize("size", [64 * 2**10, 2**20])
def test_b59_large_headers(server: LiveServer, size: int) -> None:
    answer = server.send(request(*framed(), "X-Big: " + "x" * size))
    assert status(answer) == 431
    assert error_of(answer)["type"] == "invalid_request_error"


def test_b59_many_headers_leave_memory_flat(server: LiveServer) -> None:
    head = request(*framed(), *(f"X-{i}: y" for i in range(200)))
    assert status(server.send(head)) == 431
    before = psutil.Process().memory_info().rss
    flood = request(*framed(), *(f"X-{i}: y" for i in range(100_000)))
    for _ in range(5):
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # refused while sending
            assert status(server.send(flood)) == 431
    assert psutil.Process().memory_info().rss - before < 64 * 2**20


def test_b59_a_long_target(server: LiveServer) -> None:
    for size, expected in ((4000, {414}), (2**20, {431, 400})):
        answer = server.send(
            f"GET /{'x' * size} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        assert status(answer) in expected


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_b61_methods(server: LiveServer, method: str) -> None:
    answer = httpx.request(method, server.url + "/v1/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert "access-control-allow-origin" not in answer.headers
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_unknown_paths_are_404_in_the_envelope(server: LiveServer) -> None:
    for path in ("/", "/v1", "/v1/completions/", "/docs", "/redoc", "/../etc/passwd"):
        answer = httpx.get(server.url + path)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("host", [None, "", "a/b", "foo?", "a#b", "a@b", "a b", "a:b", "é"])
def test_b63_host_headers(server: LiveServer, host: str | None) -> None:
    answer = server.send(request(*framed(), host=host))
    assert status(answer) == 400


def test_b63_two_host_headers(server: LiveServer) -> None:
    assert status(server.send(request(*framed(), "Host: other"))) == 400


def test_b65_expect_continue_gets_the_final_status(server: LiveServer) -> None:
    lines = ("Expect: 100-continue", "Content-Type: application/json", "Content-Length: 999999999")
    answer = server.send(request(*lines, body=b""))
    assert status(answer) == 413
    assert b"100 Continue" not in answer


def test_v19_two_framings_exclude_each_other(server: LiveServer) -> None:
    chunked = b"20\r\n" + GOOD + b"\r\n0\r\n\r\n"
    answer = server.send(request(*framed(), "Transfer-Encoding: chunked", body=chunked))
    assert status(answer) == 400


def test_413_for_bodies_with_and_without_a_length(server: LiveServer) -> None:
    limit = server.config.max_body_bytes

    def flow() -> object:
        for _ in range(limit // 2**20 + 2):
            yield b" " * 2**20

    headers = {"content-type": "application/json"}
    for content in (b" " * (limit + 1), flow()):
        try:
            answer = httpx.post(
                server.url + "/v1/completions",
                content=content,  # type: ignore[arg-type]  # bytes or an iterable of them
                headers=headers,
                timeout=20,
            )
        except httpx.WriteError:
            continue  # refused and closed while it was still being sent
        assert_refused(answer, status=413)


def test_b57_a_slow_body_does_not_hold_others(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(request("Content-Type: application/json", "Content-Length: 10", body=b"{"))
        assert server.post(prompt="a", max_tokens=1).status_code == 200
