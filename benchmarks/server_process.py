"""A real `rtpurbo serve` in a child process, as a user would start it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running server: where it listens and the process of its front end."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid


@contextmanager
def serving(
    model: str,
    *flags: str,
    program: Sequence[str] = ("server.cli", "serve"),
    deadline: float = 300.0,
    settings: Mapping[str, object] | None = None,
) -> Iterator[ServerProcess]:
    """Serve `model` on a free loopback port until the block ends.

    Args:
        model: folder to serve.
        flags: for the program, after its model and its port.
        program: module and first arguments; tests run one with a fake engine.
        deadline: seconds until it has to be ready.
        settings: RTPURBO_* variables, without the prefix and in lower case.

    Raises:
        RuntimeError: the server ended, or was not ready within `deadline` seconds.
    """
    port = free_port()
    command = [sys.executable, "-m", *program, model, "--port", str(port), *flags]
    variables = {f"RTPURBO_{name.upper()}": str(v) for name, v in (settings or {}).items()}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, **variables})
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process, command, time.monotonic() + deadline)
        yield ServerProcess(url, process)
    finally:
        end_process(process, 30)


def end_process(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ask a process to end, and make sure after `seconds`."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_ready(
    url: str, process: subprocess.Popen[bytes], command: Sequence[str], deadline: float
) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")
        try:
            if httpx.get(f"{url}/health/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{' '.join(command)} was not ready in time")


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
