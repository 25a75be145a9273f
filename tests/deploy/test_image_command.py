"""What the image runs, run outside Docker: its command line, user, environment and health check.

Two variables are set otherwise, since the test has no container's paths and ports of its own: the
port and the key file. The embedded model answers.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from benchmarks.server_process import free_port
from tests.deploy.confinement import IS_ROOT, as_user, on_read_only_root
from tests.deploy.dockerfile_stages import (
    ROOT,
    Step,
    command,
    environment,
    health_check,
    read_stages,
    values,
)

KEY = "a-key-of-this-test"
SECONDS_TO_READY = 100.0


@dataclass(frozen=True, slots=True)
class Container:
    """A running server, and how its health is asked for."""

    process: subprocess.Popen[bytes]
    port: int
    check: list[str]
    variables: dict[str, str]

    def health(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.check, env=self.variables, capture_output=True, text=True, timeout=60, cwd="/"
        )

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_READY
        while (done := self.health()).returncode != 0:
            assert self.process.poll() is None, "it ended"
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.2)
        assert done.stdout == "ready\n"


def image_environment(stage: list[Step], port: int, key_file: Path, tmp: Path) -> dict[str, str]:
    """The image's variables, nothing of ours but what the paths of this machine need."""
    found = environment(stage)
    scripts = Path(sys.executable).parent
    found["PATH"] = f"{scripts}:/usr/local/bin:/usr/bin:/bin"
    assert found["HOME"] == "/tmp"
    found |= {"HOME": str(tmp), "TMPDIR": str(tmp), "PYTHONPATH": str(ROOT)}
    assert found["RTPURBO_PORT"] == "8000"
    assert found["RTPURBO_API_KEY_FILE"] == "/run/secrets/api_key"
    found |= {"RTPURBO_PORT": str(port), "RTPURBO_API_KEY_FILE": str(key_file)}
    return found | {"RTPURBO_THREADS": "1", "RTPURBO_KV_CACHE_GIB": "0.05"}


@contextmanager
def container(folder: Path) -> Iterator[Container]:
    """The cpu image's process until the block ends; on a read-only root where that can be had."""
    stage = read_stages()["cpu"]
    uid = int(values(stage, "USER")[0].split(":")[0])
    key_file, tmp, port = folder / "api_key", folder / "tmp", free_port()
    key_file.write_text(f"{KEY}\n")
    key_file.chmod(0o444)
    tmp.mkdir()
    if IS_ROOT:
        os.chown(tmp, uid, uid)
    variables = image_environment(stage, port, key_file, tmp)
    started = as_user(uid, command(stage))
    process = subprocess.Popen(
        on_read_only_root(tmp, started) or started,
        env=variables,
        cwd="/",
        stdout=subprocess.DEVNULL,
    )
    try:
        yield Container(process, port, as_user(uid, health_check(stage)), variables)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    folder = tmp_path_factory.mktemp("image")
    for parent in (folder, *folder.parents):
        if parent.owner() != "root" or parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o011)  # pytest closes its folders to others
        if parent.name.startswith("pytest-of-"):
            break
    with container(folder) as server:
        yield server


def complete(server: Container, key: str | None) -> httpx.Response:
    return httpx.post(
        f"http://127.0.0.1:{server.port}/v1/completions",
        headers={} if key is None else {"Authorization": f"Bearer {key}"},
        json={"prompt": "import os\n", "max_tokens": 2, "temperature": 0},
        timeout=60,
    )


def test_it_becomes_healthy_serves_with_its_key_and_drains(running: Container) -> None:
    running.wait_until_healthy()
    assert complete(running, None).status_code == 401
    answer = complete(running, KEY)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 2
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    uids = re.findall(r"^Uid:\t(\d+)\t(\d+)", status, re.MULTILINE)[0]
    assert "0" not in uids
    assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE) or not IS_ROOT
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(30) == 0
    done = running.health()
    assert done.returncode == 1
    assert "no answer" in done.stderr
    assert done.stderr.count("\n") == 1
