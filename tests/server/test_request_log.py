"""The line of every request: what stands in it, what never does, and that it costs no waiting."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.log_lines import log_lines
from tests.server.live_server import LiveServer, live_server


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a bug of ours")


@pytest.fixture
def lines(server: LiveServer) -> Iterator[list[dict[str, Any]]]:
    """The fields of the request lines that were written so far."""
    written: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            fields = getattr(record, "fields", None)
            if fields is not None:
                written.append(
                    {**fields, "message": record.getMessage(), "level": record.levelname}
                )

    handler, log = Keep(), logging.getLogger("server.request_log")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield written
    log.removeHandler(handler)


def one(server: LiveServer, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The line of the request that was just answered; it is written after the answer."""
    server.until(lambda: bool(lines))
    assert len(lines) == 1
    return lines.pop()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_line_says_what_the_answer_says(
    server: LiveServer, lines: list[dict[str, Any]], path: str
) -> None:
    prompt: dict[str, Any] = {"prompt": "abc"}
    if "chat" in path:
        prompt = {"messages": [{"role": "user", "content": "abc"}]}
    answer = server.post(path, **prompt, max_tokens=5, n=2, ignore_eos=True)
    body, line = answer.json(), one(server, lines)
    assert line.pop("total_seconds") >= line["time_to_first_token_seconds"]
    assert line == {
        "message": f"POST {path} 200",
        "level": "INFO",
        "request_id": answer.headers["x-request-id"],
        "method": "POST",
        "route": path,
        "status": 200,
        "model": "toy",
        "completion_id": body["id"],
        "stream": False,
        "choices": 2,
        "resumes": 0,
        "finish_reasons": {"length": 2},
        "prompt_tokens": body["usage"]["prompt_tokens"],
        "cached_tokens": 0,
        "generated_tokens": 10,
        **body["metrics"],
    }


def test_a_stream_that_fails_says_why(server: LiveServer, lines: list[dict[str, Any]]) -> None:
    server.call(server.engine.running.clear)
    server.post(prompt="a", stream=True, timeout_seconds=0.1)
    line = one(server, lines)
    assert (line["status"], line["stream"]) == (200, True), "the status had left"
    assert line["error_code"] == "deadline_exceeded"
    assert line["finish_reasons"] == {"deadline": 1}
    assert "decode_seconds" not in line


def test_a_client_that_goes_away_is_an_abort(
    server: LiveServer, lines: list[dict[str, Any]]
) -> None:
    server.call(server.engine.running.clear)
    with httpx.stream("POST", server.url + "/v1/completions", json={"prompt": "a", "stream": True}):
        pass
    assert one(server, lines)["finish_reasons"] == {"abort": 1}


def test_refusals_have_their_code_and_the_clients_label(
    server: LiveServer, lines: list[dict[str, Any]]
) -> None:
    headers = {"x-request-id": "label-1"}
    httpx.post(server.url + "/v1/completions", json={"temperature": 9}, headers=headers)
    line = one(server, lines)
    assert (line["status"], line["client_request_id"]) == (400, "label-1")
    assert line["error_code"] == "invalid_value"
    assert line["request_id"] != "label-1"
    httpx.get(server.url + "/secret-path")
    line = one(server, lines)
    assert (line["route"], line["status"], line["error_code"]) == ("unmatched", 404, "not_found")


def test_probes_and_scrapes_have_a_line_only_when_their_status_changes(
    server: LiveServer, lines: list[dict[str, Any]]
) -> None:
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200
    server.engine.state = "draining"
    for _ in range(3):
        assert httpx.get(server.url + "/health/ready").status_code == 503
    server.engine.state = "ready"
    for _ in range(3):
        assert httpx.get(server.url + "/health/ready").status_code == 200
    server.until(lambda: len(lines) == 2)
    assert [(line["message"], line["level"]) for line in lines] == [
        ("GET /health/ready 503", "WARNING"),
        ("GET /health/ready 200", "INFO"),
    ]


def test_D16_no_text_of_a_user_is_ever_logged(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither of prompts nor of outputs, nor of bodies that are refused, nor of paths."""
    secret = "swordfish"
    script = server.engine.scripts
    script[tuple(server.tokenizer.encode(secret))] = server.tokenizer.encode("kippers")
    with (tmp_path / "log").open("wb") as file, log_lines("json", "front end", file.fileno()):
        assert server.post(prompt=secret, max_tokens=7).json()["choices"][0]["text"] == "kippers"
        server.post(prompt=secret, max_tokens=7, stream=True)
        server.post(prompt=secret, temperature=9, user=secret, model=secret)
        httpx.get(f"{server.url}/{secret}?{secret}=1", headers={"x-request-id": "plain"})
        monkeypatch.setattr(server.engine, "submit_all", broken)
        assert server.post(prompt=secret).status_code == 500
        server.until(lambda: "internal_error" in (tmp_path / "log").read_text())
    ours = [
        line
        for line in (tmp_path / "log").read_text().splitlines()
        if not json.loads(line)["logger"].startswith(("httpx", "httpcore"))  # the test's client
    ]
    assert sum("/v1/completions" in line for line in ours) >= 4
    assert any("traceback" in line for line in ours)
    assert not any(secret in line or "kippers" in line for line in ours)


def test_F12_a_blocked_stdout_stops_no_answer(tmp_path: Path) -> None:
    """Nobody reads the pipe: requests are answered all the same, and the lost lines counted."""
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    with log_lines("json", "front end", write_fd, max_lines=10) as output:
        with live_server(tmp_path, dropped_lines=lambda: output.dropped) as server:
            body = {"prompt": "a", "max_tokens": 1}
            with httpx.Client(base_url=server.url, timeout=20) as client:
                for _ in range(60):
                    assert client.post("/v1/completions", json=body).status_code == 200
            server.until(lambda: output.dropped > 0)
            page = httpx.get(server.url + "/metrics").text
            series = 'rtpurbo_log_lines_dropped_total{model_name="toy",process="front_end"}'
            assert float(page.split(series)[1].split()[0]) >= 1
        os.close(read_fd)  # else the end would wait for its deadline
    os.close(write_fd)
