"""Rows B71 to B83: requests that are given up by either side, refused or cut off."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.event_stream import stream
from tests.server.live_server import LiveServer


@pytest.fixture
def held(server: LiveServer) -> Iterator[LiveServer]:
    """The server with all generation held back."""
    server.call(server.engine.running.clear)
    yield server
    server.call(server.engine.running.set)


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("n", [1, 8], ids=["one", "b75 eight"])
def test_b71_b73_b75_a_client_that_goes_away_ends_its_work(
    held: LiveServer, streamed: bool, n: int
) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 200, "n": n, "stream": streamed}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    before = len(held.engine.aborted)
    with socket.create_connection(("127.0.0.1", held.port)) as connection:
        connection.sendall(head.encode() + body)
        held.until(lambda: len(held.engine.live) == n)
        if streamed:
            assert connection.recv(20).startswith(b"HTTP/1.1 200"), "headers leave at admission"
    held.until(lambda: not held.engine.live)
    assert len(held.engine.aborted) == before + n


def test_b71_in_the_middle_of_decode(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "a", "max_tokens": 200, "stream": True, "ignore_eos": True}
    before = len(server.engine.aborted)
    monkeypatch.setattr(server.engine, "pause_after", 3)
    with httpx.stream("POST", server.url + "/v1/completions", json=body) as response:
        assert any(line.startswith("data: ") for line in response.iter_lines())
    server.until(lambda: not server.engine.live)
    assert len(server.engine.aborted) == before + 1
    server.call(server.engine.running.set)


def test_progress_comments_come_while_the_prompt_is_computed(held: LiveServer) -> None:
    body = {"prompt": "abcd", "max_tokens": 2, "stream": True}
    with httpx.stream("POST", held.url + "/v1/completions", json=body, timeout=20) as response:
        lines = response.iter_lines()
        comments = [next(line for line in lines if line) for _ in range(4)]
        assert comments[-1] == ": prefill 2/4"
        assert all(comment.startswith(": prefill ") for comment in comments)
        held.call(held.engine.running.set)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"


def test_b83_deadlines(held: LiveServer) -> None:
    answer = held.post(prompt="a", timeout_seconds=0.2)
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert not held.engine.live
    events = stream(held, prompt="a", timeout_seconds=0.2)
    assert events[-2]["error"]["code"] == "deadline_exceeded"
    assert events[-1] == "data: [DONE]"
    assert not held.engine.live


def test_B83_a_deadline_that_the_engine_saw_first_is_answered_alike(held: LiveServer) -> None:
    """Both sides watch the deadline; whoever is first, the client reads the same."""
    engine = held.engine
    for streamed in (False, True):
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(held.post, prompt="a", stream=streamed)
            held.until(lambda: bool(engine.live))
            held.call(engine.expire_all)
            answer = waiting.result()
        assert answer.status_code == (200 if streamed else 408)
        assert '"code":"deadline_exceeded"' in answer.text
        assert answer.text.endswith("data: [DONE]\n\n" if streamed else "}")
        assert not engine.live


def test_B83_the_engine_is_told_the_deadline(server: LiveServer) -> None:
    before = time.monotonic()
    server.post(prompt="a", max_tokens=1, timeout_seconds=7)
    server.post(prompt="a", max_tokens=1)
    after = time.monotonic()
    named, longest = (deadline or 0.0 for deadline in server.engine.deadlines[-2:])
    assert before + 7 <= named <= after + 7
    most = server.config.max_request_seconds
    assert before + most <= longest <= after + most


def test_b81_a_reader_that_stops_reading_is_dropped(tmp_path: Any) -> None:
    from tests.server.live_server import live_server

    with live_server(tmp_path, slow_reader_seconds=0.3) as server:
        server.engine.info = type(server.engine.info)(
            **{
                **{f: getattr(server.engine.info, f) for f in server.engine.info.__struct_fields__},
                "max_model_len": 10**6,
            }
        )
        body = json.dumps(
            {
                "prompt": "a",
                "max_tokens": 200_000,
                "stream": True,
                "logprobs": 20,
                "ignore_eos": True,
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head.encode() + body)
        server.until(lambda: len(server.engine.live) == 1)
        assert server.post(prompt="b", max_tokens=3).status_code == 200, "others are not held up"
        server.until(lambda: not server.engine.live)
        page = httpx.get(server.url + "/metrics").text
        connection.close()
        ended = 'rtpurbo_requests_finished_total{model_name="toy",reason="slow_consumer"} 1.0'
        server.until(lambda: ended in httpx.get(server.url + "/metrics").text)
        assert page


def test_queue_full_is_429_with_retry_after(held: LiveServer) -> None:
    held.engine.queue_limit = 2
    answer = held.post(prompt=["a", "b", "c"])
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert answer.json()["error"]["code"] == "queue_full"
    assert not held.engine.live, "all or none"


def test_a_backlog_of_prompts_is_429_before_anything_is_tokenised(
    held: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D14: counted by the fewest tokens that the prompts can have; ids are counted exactly."""
    engine = held.engine
    monkeypatch.setattr(engine, "prefill_limit", 20)
    monkeypatch.setattr(type(held.tokenizer), "encode", lambda *_, **__: pytest.fail("tokenised"))
    rejected = 'requests_rejected_total{model_name="toy",reason="prefill_backlog"}'
    longest = held.tokenizer.longest_token_bytes
    bodies: list[dict[str, Any]] = [
        {"prompt": "a" * 21 * longest},
        {"prompt": [[70] * 11, [71] * 10]},
        {"prompt": "a" * 21 * longest, "stream": True, "n": 4},
    ]
    for body in bodies:
        answer = held.post(**body)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "4")
        assert answer.json()["error"]["code"] == "prefill_backlog"
    assert engine.held[-3:] == [(1, 21), (2, 21), (4, 21)]
    chat = {"messages": [{"role": "user", "content": "a" * 21 * longest}] * 2}
    assert held.post("/v1/chat/completions", n=3, **chat).status_code == 429
    assert engine.held[-1] == (3, 42)
    assert not engine.live
    held.until(lambda: f"rtpurbo_{rejected} 4.0" in httpx.get(held.url + "/metrics").text)


@pytest.mark.parametrize("state", ["loading", "restarting", "draining", "dead"])
def test_an_engine_that_takes_no_work_is_503(server: LiveServer, state: Any) -> None:
    server.engine.state = state
    for streamed in (False, True):
        answer = server.post(prompt="a", stream=streamed)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
    ready = httpx.get(server.url + "/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, state)
    assert httpx.get(server.url + "/health/live").status_code == 200


def test_f04_readiness_is_denied_when_the_engine_is_silent(server: LiveServer) -> None:
    server.engine.silence = 1000.0
    answer = httpx.get(server.url + "/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (503, "stalled")
    server.engine.step_allowance = 1e6  # it computes a step that may take so long
    assert httpx.get(server.url + "/health/ready").status_code == 200
    server.engine.state, server.engine.trouble = "restarting", "the model folder is not usable"
    answer = httpx.get(server.url + "/health/ready")
    assert answer.status_code == 503
    assert answer.json() == {"status": "restarting", "reason": "the model folder is not usable"}


def test_an_engine_lost_in_mid_answer(held: LiveServer) -> None:
    import threading

    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(held.post(prompt="a")))
    thread.start()
    held.until(lambda: len(held.engine.live) == 1)
    held.call(held.engine.fail_all)
    thread.join()
    assert answers[0].status_code == 503
    events: list[Any] = []
    thread = threading.Thread(target=lambda: events.extend(stream(held, prompt="a")))
    thread.start()
    held.until(lambda: len(held.engine.live) == 1)
    held.call(held.engine.fail_all)
    thread.join()
    assert events[-2]["error"]["code"] == "engine_unavailable"
    assert events[-1] == "data: [DONE]"
