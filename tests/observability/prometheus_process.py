"""A real Prometheus with the configuration that is shipped, in a child process."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.server_process import end_process, free_port
from tests.debian_tools import tool

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_READY = 60.0


def promtool(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run promtool and hand back what it said."""
    command = [tool("promtool"), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=100)


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running Prometheus and its HTTP API."""

    url: str

    def api(self, path: str, **parameters: Any) -> Any:
        """The `data` of an answer.

        Raises:
            AssertionError: Prometheus refused, with its reason.
        """
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expr: str, at: float | None = None) -> list[dict[str, Any]]:
        """Series of an expression at a time, now by default."""
        moment = {} if at is None else {"time": at}
        result: list[dict[str, Any]] = self.api("query", query=expr, **moment)["result"]
        return result

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Series of an expression from `start` to `end`, a value every `step` seconds."""
        data = self.api("query_range", query=expr, start=start, end=end, step=step)
        result: list[dict[str, Any]] = data["result"]
        return result


@contextmanager
def scraping(folder: Path, server_port: int, key_file: Path) -> Iterator[Prometheus]:
    """Scrape a server every second until the block ends; all files are kept in `folder`."""
    port = free_port()
    settings = _shipped(server_port, key_file, port)
    (folder / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
    command = [
        tool("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        found = Prometheus(f"http://127.0.0.1:{port}")
        _wait_until_ready(found, process, folder / "log")
        yield found
    finally:
        end_process(process, 20)


def _shipped(server_port: int, key_file: Path, own_port: int) -> dict[str, Any]:
    """docker/prometheus/prometheus.yml, with this machine's ports and paths, and a quick pace."""
    settings: dict[str, Any] = yaml.safe_load(
        (ROOT / "docker/prometheus/prometheus.yml").read_text()
    )
    settings["global"] |= dict.fromkeys(("scrape_interval", "scrape_timeout"), "1s")
    settings["global"]["evaluation_interval"] = "1s"
    settings["rule_files"] = [str(ROOT / "docker/prometheus" / f) for f in settings["rule_files"]]
    server, own = settings["scrape_configs"]
    assert server["authorization"]["credentials_file"] == "/run/secrets/api_key"
    server["authorization"]["credentials_file"] = str(key_file)
    server["static_configs"][0]["targets"] = [f"127.0.0.1:{server_port}"]
    own["static_configs"][0]["targets"] = [f"127.0.0.1:{own_port}"]
    return settings


def _wait_until_ready(prometheus: Prometheus, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_READY
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{prometheus.url}/-/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"Prometheus is not ready:\n{log.read_text()}")
