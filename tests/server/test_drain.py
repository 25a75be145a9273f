"""F13 and F11 of a real server process around the toy engine: SIGTERM at any time, a full disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.server_process import ServerProcess, free_port
from tests.server.toy_folder import write_toy_folder
from tests.server.toy_server import PROGRAM, toy_server

pytestmark = pytest.mark.timeout(300)

PATIENCE = 60.0  # seconds for what takes one when the machine has nothing else to do


class Reader:
    """A client that reads a stream in a thread."""

    def __init__(self, url: str, **body: Any) -> None:
        self.lines: list[str] = []
        self.begun = threading.Event()
        self._url = url
        self._body = {"prompt": [1, 2], "stream": True, "ignore_eos": True, **body}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        url = self._url + "/v1/completions"
        with httpx.stream("POST", url, json=self._body, timeout=PATIENCE) as response:
            for line in filter(None, response.iter_lines()):
                self.lines.append(line)
                if line.startswith("data: "):
                    self.begun.set()

    def events(self) -> list[Any]:
        """All that was sent, once the stream has ended."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        data = [line.removeprefix("data: ") for line in self.lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        return [json.loads(event) for event in data[:-1]]


def stops(server: ServerProcess, *children: psutil.Process) -> int:
    """The exit code of the server; its engine is gone too."""
    code: int = psutil.Process(server.pid).wait(PATIENCE)
    for child in children:
        child.wait(PATIENCE)
    return code


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_draining(url: str) -> bool:
    ready = httpx.get(url + "/health/ready")
    return ready.status_code == 503 and ready.json()["status"] == "draining"


def test_f13_running_streams_end_by_themselves(tmp_path: Path) -> None:
    with toy_server(tmp_path, step_seconds=0.05, drain_seconds=PATIENCE) as server:
        front_end = psutil.Process(server.pid)
        (engine,) = front_end.children()
        reader = Reader(server.url, max_tokens=100)
        assert reader.begun.wait(PATIENCE)
        front_end.send_signal(signal.SIGTERM)
        until(lambda: is_draining(server.url))
        assert httpx.get(server.url + "/health/live").status_code == 200
        refused = httpx.post(server.url + "/v1/completions", json={"prompt": [1]})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "engine_unavailable"
        events = reader.events()
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert stops(server, engine) == 0


def test_f13_what_does_not_end_in_time_is_told(tmp_path: Path) -> None:
    with toy_server(tmp_path, step_seconds=0.05, drain_seconds=0.2) as server:
        front_end = psutil.Process(server.pid)
        (engine,) = front_end.children()
        reader = Reader(server.url, max_tokens=90)
        assert reader.begun.wait(PATIENCE)
        front_end.send_signal(signal.SIGTERM)
        assert reader.events()[-1]["error"]["code"] == "engine_unavailable"
        assert stops(server, engine) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_f13_a_second_signal_stops_now(tmp_path: Path, second: signal.Signals) -> None:
    with toy_server(tmp_path, step_seconds=0.5, drain_seconds=3600.0) as server:
        front_end = psutil.Process(server.pid)
        (engine,) = front_end.children()
        reader = Reader(server.url, max_tokens=90)
        assert reader.begun.wait(PATIENCE)
        front_end.send_signal(signal.SIGTERM)
        until(lambda: is_draining(server.url))
        assert front_end.is_running()
        front_end.send_signal(second)
        assert "error" in reader.events()[-1]
        assert stops(server, engine) == 0


def test_f13_a_signal_while_the_model_loads(tmp_path: Path) -> None:
    write_toy_folder(tmp_path, load_seconds=3600)
    port, options = free_port(), json.dumps({"policy": {}, "settings": {}})
    command = [sys.executable, "-m", *PROGRAM, str(tmp_path), "--port", str(port), options]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:

        def answers() -> bool:
            try:
                return httpx.get(url + "/health/live").status_code == 200
            except httpx.TransportError:
                return False

        until(answers)
        ready = httpx.get(url + "/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "loading")
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            refused = httpx.post(url + path, json=body)
            assert refused.status_code == 503, path
            assert int(refused.headers["retry-after"]) >= 1
        assert httpx.get(url + "/v1/models").status_code == 503
        assert httpx.get(url + "/metrics").status_code == 200
        (engine,) = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        engine.wait(PATIENCE)


def test_f11_a_full_disk_costs_log_lines_only(tmp_path: Path) -> None:
    """No process of the server may write a byte to any file once it serves."""
    with toy_server(tmp_path / "model", drain_seconds=PATIENCE) as server:
        front_end = psutil.Process(server.pid)
        (engine,) = front_end.children()
        for process in (front_end, engine):
            process.rlimit(psutil.RLIMIT_FSIZE, (0, 0))
        url = server.url + "/v1/completions"
        for body, status in (
            ({"prompt": [1], "max_tokens": 5}, 200),
            ({"prompt": "a" * 100_000}, 400),
            ({"prompt": [1], "temperature": 9}, 400),
        ):
            assert httpx.post(url, json=body, timeout=PATIENCE).status_code == status
        assert Reader(server.url, max_tokens=5).events()
        for path in ("/metrics", "/health/live", "/health/ready", "/v1/models"):
            assert httpx.get(server.url + path).status_code == 200
        front_end.send_signal(signal.SIGTERM)
        assert stops(server, engine) == 0
