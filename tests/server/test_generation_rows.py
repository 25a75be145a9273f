"""Rows B15 to B31 and B43 to B83: what generation does with odd but legal requests."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.live_server import LiveServer


def stream(server: LiveServer, path: str = "/v1/completions", **body: Any) -> list[Any]:
    """Events of a stream: parsed data, "[DONE]", and comments as they are."""
    events: list[Any] = []
    with httpx.stream(
        "POST", server.url + path, json={**body, "stream": True}, timeout=20
    ) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line[6:]))
            elif line:
                events.append(line)
    return events


def texts(events: list[Any]) -> dict[int, str]:
    joined: dict[int, str] = {}
    for event in events:
        for choice in event["choices"] if isinstance(event, dict) and "choices" in event else []:
            joined[choice["index"]] = joined.get(choice["index"], "") + choice["text"]
    return joined


def script(server: LiveServer, prompt: str, *tokens: str | bytes) -> None:
    """Make the toy model answer `prompt` with these tokens, given as text or raw bytes."""
    pieces: list[int] = []
    for token in tokens:
        raw = token.encode() if isinstance(token, str) else token
        pieces.extend(next(i for i in range(320) if _bytes(server, i) == bytes([b])) for b in raw)
    server.engine.scripts[tuple(server.tokenizer.encode(prompt))] = pieces


def _bytes(server: LiveServer, token_id: int) -> bytes:
    return server.tokenizer.token_bytes(token_id) if token_id >= 64 else b""


def test_b15_greedy_choices_are_equal_and_sampled_ones_differ(server: LiveServer) -> None:
    greedy = server.post(prompt="a", n=3, temperature=0, max_tokens=8).json()
    assert [choice["index"] for choice in greedy["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in greedy["choices"]}) == 1
    sampled = server.post(prompt="a", n=3, seed=1, max_tokens=8).json()
    assert len({choice["text"] for choice in sampled["choices"]}) == 3
    assert sampled["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 24,
        "total_tokens": 25,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_b17_zero_logprobs_reports_the_token_only(server: LiveServer) -> None:
    logprobs = server.post(prompt="a", logprobs=0, max_tokens=3).json()["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 3
    assert logprobs["top_logprobs"] is None
    assert logprobs["text_offset"] == [0, 1, 2]


def test_b19_minus_infinity_becomes_a_number(server: LiveServer) -> None:
    server.engine.minus_infinity = True
    bodies: list[dict[str, Any]] = [{"logprobs": 2}, {"logprobs": 2, "echo": True}]
    for body in bodies:
        answer = server.post(prompt="ab", max_tokens=2, **body)
        assert "Infinity" not in answer.text
        logprobs = answer.json()["choices"][0]["logprobs"]
        assert set(logprobs["token_logprobs"]) - {None} == {-9999.0}


STOPS: dict[str, tuple[str, list[str], str, int]] = {
    # generated text, stops, expected text, tokens that count
    "inside": ("hello world", ["lo w"], "hel", 7),
    "overlapping": ("aXXY", ["XXY", "XY"], "a", 4),
    "the earlier complete one wins": ("abcd", ["abcd", "bc"], "a", 3),
    "first output": ("stop", ["s"], "", 1),
    "never": ("abc", ["zzz"], "abc", 3),
}


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("streamed", [False, True])
def test_b23_stop_strings(server: LiveServer, name: str, streamed: bool) -> None:
    generated, stops, expected, tokens = STOPS[name]
    script(server, "p", generated)
    body: dict[str, Any] = {"prompt": "p", "stop": stops, "max_tokens": len(generated)}
    if streamed:
        body["stream_options"] = {"include_usage": True}
        events = stream(server, **body)
        assert texts(events)[0] == expected
        usage = events[-2]["usage"]
        finish = [
            e["choices"][0]["finish_reason"] for e in events if isinstance(e, dict) and e["choices"]
        ]
        reason = finish[-1]
        assert finish[:-1] == [None] * (len(finish) - 1)
    else:
        answer = server.post(**body).json()
        assert answer["choices"][0]["text"] == expected
        usage, reason = answer["usage"], answer["choices"][0]["finish_reason"]
    assert usage["completion_tokens"] == tokens
    assert reason == ("length" if name == "never" else "stop")


def test_b23_the_engine_stops_too(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    script(server, "p", "abc", "x" * 200)
    before = len(server.engine.aborted)
    monkeypatch.setattr(server.engine, "pause_after", 3)
    server.post(prompt="p", stop="b", max_tokens=200)
    server.until(lambda: len(server.engine.aborted) == before + 1)


@pytest.mark.parametrize("streamed", [False, True])
def test_b25_a_stop_cut_by_max_tokens_is_sent(server: LiveServer, streamed: bool) -> None:
    script(server, "p", "abcSTO", "P")
    body: dict[str, Any] = {"prompt": "p", "stop": ["STOP"], "max_tokens": 6}
    if streamed:
        assert texts(stream(server, **body))[0] == "abcSTO"
    else:
        choice = server.post(**body).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("abcSTO", "length")


def test_b31_seeds_reproduce_alone_and_together(server: LiveServer) -> None:
    alone = server.post(prompt="a", seed=5, max_tokens=12).json()["choices"][0]["text"]
    again = server.post(prompt=["b", "a"], seed=5, max_tokens=12).json()["choices"][1]["text"]
    other = server.post(prompt="a", seed=6, max_tokens=12).json()["choices"][0]["text"]
    assert alone == again
    assert alone != other


def test_b43_characters_split_over_tokens(server: LiveServer) -> None:
    script(server, "p", "x", "\U0001f469".encode()[:2], "\U0001f469".encode()[2:], "y", b"\xf0\x9f")
    events = stream(server, prompt="p", max_tokens=8)
    pieces = [c["text"] for e in events if isinstance(e, dict) for c in e["choices"] if c["text"]]
    assert pieces == ["x", "\U0001f469", "y", "\ufffd"]
    whole = server.post(prompt="p", max_tokens=8).json()["choices"][0]["text"]
    assert whole == "".join(pieces)


@pytest.mark.parametrize("stop", [None, ["c"]])
def test_b51_usage_comes_last_before_done(server: LiveServer, stop: list[str] | None) -> None:
    script(server, "p", "abcdef")
    options = {"include_usage": True}
    events = stream(server, prompt="p", stop=stop, max_tokens=6, stream_options=options)
    assert events[-1] == "data: [DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == (3 if stop else 6)
    assert events[-2]["metrics"]["attended_fraction"] == pytest.approx(0.1)
    assert all("usage" not in event for event in events[:-2] if isinstance(event, dict))


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


def test_b79_the_same_prompt_many_times(server: LiveServer) -> None:
    server.engine.queue_limit = 1000
    answer = server.post(prompt=["same"] * 128, temperature=0, max_tokens=3).json()
    assert len(answer["choices"]) == 128
    assert len({choice["text"] for choice in answer["choices"]}) == 1
    assert answer["usage"]["prompt_tokens"] == 4 * 128


def test_timings_are_reported(server: LiveServer) -> None:
    """Phases by the engine's clock, which the toy makes up; the first token as it came here."""
    begun = time.monotonic()
    metrics = server.post(prompt="a", max_tokens=4, ignore_eos=True).json()["metrics"]
    assert 0 < metrics.pop("time_to_first_token_seconds") < time.monotonic() - begun
    assert metrics == {
        "queue_seconds": pytest.approx(0.001),
        "prefill_seconds": pytest.approx(0.5),
        "decode_seconds": pytest.approx(0.03),
        "attended_tokens_mean": pytest.approx(20.0),
        "attended_fraction": pytest.approx(0.1),
    }
    first = server.post(prompt="a", max_tokens=1, ignore_eos=True).json()["metrics"]
    assert first["attended_fraction"] is None, "one token comes from the prefill: nothing selected"


def test_streams_and_answers_agree(server: LiveServer) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "ab", "logprobs": 2},
        {"prompt": "ab", "logprobs": 1, "echo": True},
        {"prompt": ["a", "b"], "n": 2, "seed": 3, "stop": ["e", ". "]},
        {"prompt": [70, 71], "echo": True, "max_tokens": 0},
    ]
    for body in bodies:
        settings: dict[str, Any] = {"max_tokens": 24, "temperature": 0.5, "seed": 9, **body}
        whole = server.post(**settings).json()
        events = stream(server, **settings, stream_options={"include_usage": True})
        assert events[-2]["usage"] == whole["usage"]
        for choice in whole["choices"]:
            assert texts(events).get(choice["index"], "") == choice["text"]
            parts = [
                c["logprobs"]
                for e in events
                if isinstance(e, dict)
                for c in e["choices"]
                if c["index"] == choice["index"] and c["logprobs"]
            ]
            for key, values in (choice["logprobs"] or {}).items():
                assert [x for part in parts for x in part[key]] == values
