"""Large bodies are read in small steps: the same result as in one, and nobody else has to wait."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server import large_body
from server.errors import ApiError
from server.large_body import MAX_VALUES, cut_body
from server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse_body,
    parse_large_body,
)
from tests.server.live_server import LiveServer, live_server
from tests.server.test_bad_inputs import JSON, assert_refused


@pytest.fixture
def tiny_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is large, and every step is short."""
    monkeypatch.setattr(large_body, "_LONG_TEXT", 16)
    monkeypatch.setattr(large_body, "_LONG_LIST", 2)
    monkeypatch.setattr(large_body, "_PIECE", 16)


def outcome(parse: Callable[..., Any], kind: type[Any], raw: bytes) -> Any:
    """What a parser makes of a body, with lists of ids in one shape."""
    try:
        body = parse(kind, raw)
    except ApiError as error:
        return error.status
    return json.loads(json.dumps(body.model_dump(), default=array.tolist))


TEXTS = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(
    ["\\" * 7, '"' * 5, "\u00e9" * 30, "\U0001f469" * 9, "a\\u00e9", "]", "[1,2", "{", "\n\t\x00"]
)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=30)
VALUES = TEXTS | IDS | st.lists(TEXTS | IDS, max_size=4)
BODIES = st.fixed_dictionaries(
    {}, optional={"prompt": VALUES, "max_tokens": st.integers(0, 9), "stop": st.just(["a"])}
)
WRITERS = st.sampled_from(
    [
        lambda value: json.dumps(value).encode(),
        lambda value: json.dumps(value, ensure_ascii=False).encode(),
        lambda value: json.dumps(value, separators=(",", ":")).encode(),
        lambda value: json.dumps(value, indent=1).encode(),
    ]
)
ONCE = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@ONCE
@given(body=BODIES, write=WRITERS)
def test_small_steps_read_what_one_step_reads(
    tiny_steps: None, body: dict[str, Any], write: Callable[[Any], bytes]
) -> None:
    raw = write(body)
    assert outcome(parse_large_body, CompletionRequest, raw) == outcome(
        parse_body, CompletionRequest, raw
    )


@ONCE
@given(
    body=BODIES,
    write=WRITERS,
    place=st.integers(0),
    inserted=st.sampled_from([b'"', b"\\", b"[", b"]", b",", b"\xff", b"\xed\xa0\x80", b"-", b""]),
    dropped=st.integers(0, 3),
)
def test_b49_small_steps_make_nothing_valid(
    tiny_steps: None,
    body: dict[str, Any],
    write: Callable[[Any], bytes],
    place: int,
    inserted: bytes,
    dropped: int,
) -> None:
    """Whatever is broken stays broken; what is still valid reads the same or is refused."""
    raw = write(body)
    raw = raw[:place] + inserted + raw[place + dropped :]
    in_steps = outcome(parse_large_body, CompletionRequest, raw)
    assert in_steps in (400, outcome(parse_body, CompletionRequest, raw))


BROKEN = {
    "b39 surrogate": b'{"prompt": "aaaaaaaa\\ud800"}',
    "b39 low surrogate": b'{"prompt": "aaaaaaaa\\udc00"}',
    "empty place": b'{"prompt": [1,,2]}',
    "empty place at a piece": b'{"prompt": [1,2,3,4,5,6,7,8,,9,10,11,12]}',
    "trailing comma": b'{"prompt": [1,2,3,4,5,6,7,8,9,]}',
    "trailing comma at a piece": b'{"prompt": [1,2,3,4,5,6,7,]}',
    "no comma": b'{"prompt": [1 2 3 4 5 6 7 8 9 10]}',
    "leading zero": b'{"prompt": [01,2,3,4]}',
    "long number": b'{"prompt": [' + b"1" * 50 + b"]}",
    "b33 too large": b'{"prompt": [2147483648, 1, 2]}',
    "open text": b'{"prompt": "aaaaaaaaaa',
    "open list": b'{"prompt": [1,2,3,4,5,6',
    "control character": b'{"prompt": "aaaaaaaaaa\n"}',
    "long text elsewhere": b'{"prompt": "a", "user": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}',
    "long list elsewhere": b'{"prompt": "a", "x": [1,2,3,4]}',
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
def test_b33_b39_b49_broken_large_bodies(tiny_steps: None, raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_large_body(CompletionRequest, raw)
    assert caught.value.status == 400


def test_every_bulky_field_may_be_large(tiny_steps: None) -> None:
    text, ids = "a text that is long", list(range(20))
    parts = [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": text}, {"role": "user", "content": parts}]
    bodies: list[tuple[type[Any], str, Any]] = [
        (TokenizeRequest, "prompt", text),
        (CompletionRequest, "prompt", [text, "b"]),
        (DetokenizeRequest, "tokens", ids),
        (ChatCompletionRequest, "messages", messages),
    ]
    for kind, field, value in bodies:
        read = outcome(parse_large_body, kind, json.dumps({field: value}).encode())
        assert read[field] == value


def test_b27_b35_the_number_of_values_is_bounded() -> None:
    for field, value in (
        ("prompt", "[" + "{}," * MAX_VALUES + "{}]"),
        ("prompt", "[" + "[]," * MAX_VALUES + "[]]"),
        ("prompt", "[" + "1.5," * MAX_VALUES + "1]"),
        ("logit_bias", json.dumps(dict.fromkeys(range(MAX_VALUES), 1))),
        ("x", "[" + "[" * MAX_VALUES),
    ):
        with pytest.raises(ApiError) as caught:
            cut_body(f'{{"{field}": {value}}}'.encode(), {"prompt", "logit_bias"})
        assert caught.value.code == "too_many_values"
        assert caught.value.param == (None if field == "x" else field)


MIB = 2**20
LARGE: dict[str, bytes] = {
    "ids": b'{"max_tokens": 1, "prompt": [' + b"70," * (16 * MIB // 3 - 40) + b"70]}",
    "text": b'{"max_tokens": 1, "prompt": "' + b"a" * (16 * MIB - 64) + b'"}',
    "escapes": b'{"max_tokens": 1, "prompt": "' + b"\\u00e9" * (16 * MIB // 6 - 40) + b'"}',
    "quotes": b'{"max_tokens": 1, "prompt": "' + b'\\"' * (16 * MIB // 2 - 40) + b'"}',
    "lists": b'{"x": [' + b"[]," * (16 * MIB // 3 - 40) + b"[]]}",
    "objects": b'{"prompt": [' + b"{}," * (16 * MIB // 3 - 40) + b"{}]}",
    "open brackets": b'{"prompt": ' + b"[" * (16 * MIB - 64) + b"}",
    "floats": b'{"prompt": [' + b"1.5," * (16 * MIB // 4 - 40) + b"1]}",
    "fields": b"{" + b",".join(b'"%07x": 0' % i for i in range(MIB)) + b"}",
    "nothing": b'{"prompt": "a"' + b" " * (16 * MIB - 64),
}


class LagProbe:
    """The longest time for which the server's event loop did nothing else.

    In CPU seconds of this process: what other processes take in between does not count.
    """

    def __init__(self) -> None:
        self.longest = 0.0

    async def run(self) -> None:
        while True:
            before = time.process_time()
            await asyncio.sleep(0.002)
            self.longest = max(self.longest, time.process_time() - before)


@contextmanager
def lag_probe(server: LiveServer) -> Iterator[LagProbe]:
    probe, tasks = LagProbe(), []
    server.call(lambda: tasks.append(server.loop.create_task(probe.run())))
    yield probe
    server.call(tasks[0].cancel)


@pytest.mark.parametrize("name", LARGE)
def test_f04_health_answers_while_large_bodies_are_read(server: LiveServer, name: str) -> None:
    """Blocked for 0.2 to 4 s when such bodies were parsed at once; now for some 10 ms."""
    raw = LARGE[name]
    answers: list[httpx.Response] = []

    def post() -> None:
        url = server.url + "/v1/completions"
        answers.append(httpx.post(url, content=raw, headers=JSON, timeout=60))

    thread = threading.Thread(target=post)
    with lag_probe(server) as probe, httpx.Client() as client:
        thread.start()
        while thread.is_alive():
            assert client.get(server.url + "/health/live", timeout=20).status_code == 200
            thread.join(0.02)
    print(f"{name}: the loop was blocked for at most {probe.longest * 1000:.0f} ms")
    error = assert_refused(answers[0])
    if name in ("ids", "text", "escapes", "quotes"):
        assert error["code"] == "context_length_exceeded", "it was read to its end"
    assert probe.longest < 0.25


def test_f10_a_text_of_too_many_tokens_is_not_handed_over(tmp_path: Path) -> None:
    with live_server(tmp_path) as server:
        answer = server.post(prompt="a" * 3000)
        error = assert_refused(answer, param="prompt")
        assert error["code"] == "context_length_exceeded"
        ids = server.post(prompt=[70] * 3000)
        assert assert_refused(ids, param="prompt")["code"] == "context_length_exceeded"
        answer = server.post("/detokenize", tokens=[70] * 3000)
        assert assert_refused(answer, param="tokens")
