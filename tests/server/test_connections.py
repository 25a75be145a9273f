"""Connections as a resource: caps, a reserve for probes, peers that are dead; F16 and F22."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from engine.errors import ConfigError
from server import connections
from server.connections import RESERVED, SPARE_DESCRIPTORS, ConnectionCounter
from server.runner import bind
from tests.server.live_server import LiveServer, live_server
from tests.server.raw_http import get, status


@contextmanager
def silent(server: LiveServer, count: int) -> Iterator[list[socket.socket]]:
    """Connections that say nothing."""
    with ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        yield [
            stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(count)
        ]


def test_f22_above_the_cap_only_probes_are_answered(tmp_path: Path) -> None:
    with live_server(tmp_path, max_connections=4) as server:
        with silent(server, 4):
            answer = server.post(prompt="a", max_tokens=1)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "too_many_connections"
            assert answer.headers["retry-after"] == "1"
            for path in ("/health/live", "/health/ready", "/metrics"):
                probe = httpx.get(server.url + path)
                assert probe.status_code == 200
                assert probe.headers["connection"] == "close"
        server.until(lambda: server.post(prompt="a", max_tokens=1).status_code == 200)


def test_f22_silent_connections_make_room_for_a_probe(tmp_path: Path) -> None:
    """The oldest silent one above the cap goes first; those below the cap are left alone."""
    with (
        live_server(tmp_path, max_connections=2, header_seconds=60) as server,
        silent(server, 2 + RESERVED) as held,
    ):
        assert httpx.get(server.url + "/health/live").status_code == 200
        assert held[2].recv(1) == b""
        held[0].sendall(get("/version", "Connection: close"))
        assert status(held[0].recv(100)) == 200


def test_a_client_has_its_own_cap(tmp_path: Path) -> None:
    with live_server(tmp_path, max_connections_per_client=3) as server, silent(server, 3) as held:
        address = ("127.0.0.1", server.port)
        with socket.create_connection(address, timeout=20) as extra:
            assert extra.recv(1) == b"", "closed, not reset"
        held[0].sendall(get("/version"))
        assert status(held[0].recv(100)) == 200
        with socket.create_connection(
            address, timeout=20, source_address=("127.0.0.2", 0)
        ) as other:
            other.sendall(get("/version", "Connection: close"))
            assert status(other.recv(100)) == 200, "another client is not affected"


def test_the_counter_forgets_clients_that_left() -> None:
    class Connection:
        def evict(self) -> None:
            raise AssertionError("nobody had to make room")

    counter, first = ConnectionCounter(most=1, per_client=1), Connection()
    assert counter.is_welcome("a")
    assert not counter.is_full
    assert not counter.is_welcome("a")
    assert counter.is_full
    counter.leave(first, "a")
    counter.leave(first, "a")
    assert not counter.is_full
    assert counter.is_welcome("a")


def test_f22_a_small_descriptor_limit_refuses_cleanly(tmp_path: Path) -> None:
    """In a process of its own, allowed few files: no spin, no crash, and probes are answered."""
    limit = SPARE_DESCRIPTORS + RESERVED + 12
    script = "import sys; from tests.server.test_connections import serve_few; serve_few(sys.argv)"
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), str(limit)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child, ExitStack() as stack:
        port = int(child.stdout.readline())
        for _ in range(limit + 50):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert httpx.get(f"http://127.0.0.1:{port}{path}", timeout=20).status_code == 200
        child.stdin.close()
        seconds, opened = json.loads(child.stdout.readline())
        assert opened < limit
        assert seconds < 5, "CPU time of the server while it was full"
        assert child.wait(60) == 0


def serve_few(arguments: list[str]) -> None:
    """The other side of the test above."""
    folder, limit = Path(arguments[1]), int(arguments[2])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with live_server(folder, header_seconds=60) as server:
        print(server.port, flush=True)
        begun = sum(os.times()[:2])
        sys.stdin.read()
        opened = len(os.listdir("/proc/self/fd"))
        print(json.dumps([sum(os.times()[:2]) - begun, opened]), flush=True)


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "expected"),
    [
        (64, 4096, 1000, 1000),
        (64, 512, 1000, 512 - RESERVED - SPARE_DESCRIPTORS),
        (-1, -1, 1000, 1000),
        (64, -1, 1000, 1000),
        (4096, 4096, 1000, 1000),
    ],
)
def test_f22_the_soft_limit_is_raised_as_far_as_needed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int, expected: int
) -> None:
    held = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: held[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: held.append(pair))
    assert connections.affordable_connections(wanted) == expected
    soft_now, hard_now = held[-1]
    assert hard_now == hard
    assert soft_now == -1 or soft_now >= expected + RESERVED + SPARE_DESCRIPTORS


def test_f22_a_limit_that_leaves_room_for_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: None)
    with pytest.raises(ConfigError, match="max_connections"):
        connections.affordable_connections(10)


def test_f16_dead_peers_are_noticed() -> None:
    """Power loss closes nothing: the kernel must ask. Accepted sockets inherit the options."""
    with (
        bind("127.0.0.1", 0, dead_peer_seconds=90) as listener,
        socket.socket() as client,
    ):
        listener.listen()
        client.connect(listener.getsockname())
        with listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            read = {
                name: accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            }
    silence = read["TCP_KEEPIDLE"] + read["TCP_KEEPINTVL"] * read["TCP_KEEPCNT"]
    assert silence <= 60
    assert read["TCP_USER_TIMEOUT"] == 90_000
