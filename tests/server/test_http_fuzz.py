"""Raw bytes to a real socket: no 5xx, no hang, and the server answers a good request afterwards.

The draws depend on nothing but the code, so a failure here can be repeated.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.server.live_server import LiveServer, live_server

GOOD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 48\r\n\r\n{"prompt": "a", "max_tokens": 2, "stream": true}'
)
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = (
    b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Transfer-Encoding: chunked\r\n\r\n8\r\n{"prompt\r\n6\r\n": "a"\r\n1\r\n}\r\n0\r\n\r\n'
)
PROBE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
REQUESTS = st.sampled_from([GOOD, GET, CHUNKED])
STATUS = re.compile(rb"HTTP/1\.1 (\d\d\d) ")

fuzzed = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Deadlines so short that whatever is incomplete is soon refused."""
    limits: dict[str, Any] = {"header_seconds": 0.25, "body_seconds": 0.25, "idle_seconds": 0.25}
    with live_server(tmp_path_factory.mktemp("quick"), keep_alive_seconds=0.05, **limits) as server:
        yield server
        server.until(lambda: not server.engine.live)


def exchange(server: LiveServer, raw: bytes, *, half_close: bool = True) -> bytes:
    """What the server says until it closes; the socket's timeout is the test for hangs."""
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection,
        contextlib.suppress(ConnectionResetError, BrokenPipeError),
    ):
        connection.sendall(raw)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            answer += piece
    return answer


def check(server: LiveServer, raw: bytes, *, half_close: bool = True) -> list[int]:
    """Statuses of the answers to these bytes, after which a good request is answered."""
    answer = exchange(server, raw, half_close=half_close)
    statuses = [int(status) for status in STATUS.findall(answer)]
    assert all(status < 500 for status in statuses), answer[:500]
    assert STATUS.findall(exchange(server, PROBE, half_close=False)) == [b"200"]
    return statuses


def test_the_requests_to_start_from_are_good(quick: LiveServer) -> None:
    for raw in (GOOD, GET, CHUNKED):
        assert check(quick, raw + PROBE, half_close=False) == [200, 200]


@fuzzed
@given(raw=st.binary(max_size=400))
def test_bytes_without_a_grammar(quick: LiveServer, raw: bytes) -> None:
    check(quick, raw)


@fuzzed
@given(
    raw=REQUESTS,
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=6)), min_size=1, max_size=4
    ),
    half_close=st.booleans(),
)
def test_mutated_requests(
    quick: LiveServer, raw: bytes, edits: list[tuple[float, int, bytes]], half_close: bool
) -> None:
    for place, dropped, inserted in edits:
        at = int(place * len(raw))
        raw = raw[:at] + inserted + raw[at + dropped :]
    check(quick, raw, half_close=half_close)


@fuzzed
@given(
    name=st.sampled_from(
        "Host Content-Length Transfer-Encoding Content-Type Connection Expect Upgrade "
        "X-Request-Id Authorization Content-Encoding Range Cookie Forwarded".split()
    ),
    value=st.binary(max_size=30)
    | st.sampled_from(
        [b"chunked", b"-1", b"1, 1", b"close", b"upgrade", b"websocket", b"100-continue", b"0x10"]
    ),
    method=st.sampled_from(["GET", "POST", "HEAD", "OPTIONS", "CONNECT", "TRACE", "PRI", "get"]),
    target=st.sampled_from(
        ["/v1/completions", "/v1/models/%00", "*", "x:1", "http://a/b", "/%zz", "//", "/../metrics"]
    ),
    version=st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/0.9", "HTTP/1.2"]),
)
def test_odd_heads(
    quick: LiveServer, name: str, value: bytes, method: str, target: str, version: str
) -> None:
    line = f"{method} {target} {version}\r\n".encode()
    head = line + b"Host: localhost\r\n" + name.encode() + b": " + value + b"\r\n\r\n"
    check(quick, head + b"{}", half_close=False)


@fuzzed
@given(requests=st.lists(REQUESTS, min_size=2, max_size=6), cut=st.integers(0, 120))
def test_pipelines_that_end_anywhere(quick: LiveServer, requests: list[bytes], cut: int) -> None:
    """All whole requests but the last are answered, in order; the client closes when it likes."""
    raw = b"".join(requests)
    statuses = check(quick, raw[: len(raw) - cut], half_close=False)
    assert statuses[: len(requests) - 2] == [200] * (len(requests) - 2)


@fuzzed
@given(raw=REQUESTS, kept=st.floats(0, 1))
def test_requests_that_break_off(quick: LiveServer, raw: bytes, kept: float) -> None:
    quick.send(raw[: int(kept * len(raw))], close=True)
    check(quick, b"")
