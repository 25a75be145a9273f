"""Rows B01 to B49 of the table of bad inputs: each ends in one clean 400, and nothing is left."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from tests.server.live_server import LiveServer

JSON = {"content-type": "application/json"}


def assert_refused(
    response: httpx.Response, status: int = 400, param: str | None = None, secret: str = ""
) -> dict[str, Any]:
    """The house rules for every refusal."""
    assert response.status_code == status, response.text[:300]
    assert len(response.content) < 1024
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) <= 300
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    if secret:
        assert secret not in response.text
    return error


def raw(server: LiveServer, body: bytes | str, path: str = "/v1/completions") -> httpx.Response:
    content = body.encode() if isinstance(body, str) else body
    return httpx.post(server.url + path, content=content, headers=JSON, timeout=20)


FIELDS: dict[str, tuple[str, list[str]]] = {
    "b01 temperature": ("temperature", ["NaN", "Infinity", "-Infinity", "1e999", '"NaN"']),
    "b03 temperature": ("temperature", ['"0.7"', "[0.7]", "{}", "true", "-0.1", "2.1"]),
    "b05 top_k": ("top_k", ["-2", "0.5", "1000000000", "true"]),
    "b05 min_p": ("min_p", ["-0.1", "1.1", "NaN", '"0"']),
    "b05 top_p": ("top_p", ["0", "1.01", "-1", "NaN"]),
    "b07 max_tokens": ("max_tokens", ["-1", "0", "1.5", '"5"', "true", "99999999999999999999"]),
    "b13 min_tokens": ("min_tokens", ["17", "-1", "1.0"]),
    "b15 n": ("n", ["0", "129", "-1", "1.0", "true", "1000000000000"]),
    "b17 logprobs": ("logprobs", ["-1", "21", "1000000000", '"3"', "true"]),
    "b21 stop": ("stop", ['""', '["", "a"]', "[1]", "[null]", "{}", "1", '["a","b","c","d","e"]']),
    "b21 long stop": ("stop", [json.dumps("x" * 257)]),
    "b27 logit_bias": (
        "logit_bias",
        [f'{{"{key}": 1}}' for key in ("x", "-1", "320", "1.5", "\\u0661")]
        + [f'{{"1": {bias}}}' for bias in ('"a"', "true", "101", "NaN")],
    ),
    "b27 many": ("logit_bias", [json.dumps({str(i): 1 for i in range(100_000)})]),
    "v05 stop ids": ("stop_token_ids", ["[-1]", "[320]", "[1.0]", "[true]", '["1"]', "1"]),
    "v05 many stop ids": (
        "stop_token_ids",
        [json.dumps(list(range(129))), "[1" + ",1" * 500_000 + "]"],
    ),
    "b31 seed": ("seed", ["1.5", '"1"', "9223372036854775808", "true"]),
    "b53 user": ("user", [json.dumps("u" * 257), json.dumps("a\nb"), "1"]),
    "penalties": ("presence_penalty", ["-2.1", "3", "NaN"]),
    "repetition": ("repetition_penalty", ["0", "-1", "NaN"]),
    "selection mass": ("attention_top_p", ["0", "1.1", "NaN", "true"]),
    "deadline": ("timeout_seconds", ["0", "-1", "NaN"]),
    "flags": ("stream", ['"true"', "1"]),
    "echo": ("echo", ['"yes"', "1"]),
    "stream_options": ("stream_options", ["1", '{"include_usage": 1}', '{"include_usage": true}']),
    "b47 suffix": ("suffix", ['"x"', "1"]),
    "b47 best_of": ("best_of", ["2"]),
}
CASES = [
    pytest.param(field, value, id=f"{row}={value[:20]}")
    for row, (field, values) in FIELDS.items()
    for value in values
]


@pytest.mark.parametrize(("field", "value"), CASES)
def test_fields_out_of_bounds_or_type(server: LiveServer, field: str, value: str) -> None:
    began = time.monotonic()
    response = raw(server, f'{{"prompt": "SECRET", "{field}": {value}}}')
    param = None if value in ("NaN", "Infinity", "-Infinity", "{}") else field
    assert_refused(response, param=param, secret="SECRET")
    assert time.monotonic() - began < 5


PROMPTS: dict[str, str] = {
    "v01 empty text": '""',
    "v01 empty list": "[]",
    "v01 list in list": "[[]]",
    "v01 empty text in list": '[""]',
    "b33 negative": "[-1]",
    "b33 width": "[320]",
    "b33 2^32": "[4294967296]",
    "b33 2^63": "[9223372036854775808]",
    "b33 float": "[1.0]",
    "b33 bools": "[true, false]",
    "b33 mixed": '[1, "a"]',
    "b33 mixed lists": '[[1], "a"]',
    "b33 depth": "[[[1]]]",
    "number": "1",
    "null": "null",
    "object": "{}",
    "b35 objects": "[" + ",".join(["{}"] * 300_000) + "]",
    "b35 nulls": "[" + ",".join(["null"] * 300_000) + "]",
    "v04 prompts": json.dumps(["a"] * 129),
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_b33_b35_prompts(server: LiveServer, prompt: str) -> None:
    assert_refused(raw(server, f'{{"prompt": {prompt}}}'), param="prompt")


BODIES: dict[str, bytes] = {
    "b45 nesting": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "b45 nesting in an unknown field": b'{"prompt": "a", "x": ' + b"[" * 300 + b"]" * 300 + b"}",
    "b49 array": b"[]",
    "b49 string": b'"x"',
    "b49 null": b"null",
    "b49 number": b"1",
    "b49 empty": b"",
    "b49 trailing": b'{"prompt": "a"} x',
    "b49 two objects": b'{"prompt": "a"}{"prompt": "b"}',
    "b49 truncated": b'{"prompt": "a"',
    "b49 comment": b'{"prompt": "a" /* c */}',
    "b49 quotes": b"{'prompt': 'a'}",
    "b49 utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "b49 bom": b'\xef\xbb\xbf{"prompt": "a"}',
    "b49 bad utf-8": b'{"prompt": "\xff\xfe"}',
    "b39 surrogate in prompt": b'{"prompt": "\\ud800"}',
    "b39 surrogate in stop": b'{"prompt": "a", "stop": "\\ud800"}',
    "b39 surrogate in model": b'{"prompt": "a", "model": "\\ud800"}',
    "b39 surrogate in user": b'{"prompt": "a", "user": "\\ud800"}',
    "b39 surrogate in a key": b'{"prompt": "a", "\\ud800": 1}',
    "5,000 digits": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_b39_b45_b49_bodies(server: LiveServer, path: str, body: bytes) -> None:
    assert_refused(raw(server, body, path))


def test_b49_an_empty_object_lacks_its_prompt(server: LiveServer) -> None:
    assert_refused(raw(server, "{}"), param="prompt")


def test_b11_a_prompt_that_fills_the_context(server: LiveServer) -> None:
    limit = server.engine.info.max_model_len
    for size in (limit, limit + 1, 50 * limit):
        error = assert_refused(server.post(prompt="a" * size), param="prompt")
        assert error["code"] == "context_length_exceeded"
        assert str(limit) in error["message"]
    assert str(limit + 1) in server.post(prompt=[70] * (limit + 1)).json()["error"]["message"]
    response = server.post(prompt="a" * (limit - 1), max_tokens=50)
    assert response.json()["usage"]["completion_tokens"] == 1


def test_b09_max_tokens_defaults_to_sixteen(server: LiveServer) -> None:
    bodies: list[dict[str, Any]] = [{}, {"max_tokens": None}]
    for body in bodies:
        answer = server.post(prompt="a", ignore_eos=True, **body).json()
        assert answer["usage"]["completion_tokens"] == 16


def test_b05_off_values_and_large_k(server: LiveServer) -> None:
    for top_k, seen in ((-1, 0), (0, 0), (5000, 320)):
        assert server.post(prompt="a", top_k=top_k).status_code == 200
        assert server.engine.submitted[-1].top_k == seen


def test_b47_unknown_fields_are_ignored_and_counted(server: LiveServer) -> None:
    name = 'rtpurbo_request_unknown_fields_total{model_name="toy"}'

    def count() -> float:
        page = httpx.get(server.url + "/metrics").text
        return float(page.split(name)[1].split()[0])

    before = count()
    assert server.post(prompt="a", made_up=[1], other={"x": 1}, suffix=None).status_code == 200
    server.until(lambda: count() == before + 2)


def test_b37_hostile_texts_take_linear_time(server: LiveServer) -> None:
    """Refused before or after tokenising; either way the loop goes on answering."""
    for text in ("a" * 2**20, " " * 2**20, "\u0301" * 2**18, "\U0001f600" * 2**18):
        assert_refused(server.post(prompt=text), param="prompt")
        assert httpx.get(server.url + "/health/live", timeout=20).status_code == 200


@pytest.mark.parametrize("text", ["a\x00b", "\x01\x1f", "\u202eabc", "\uffff", "\U0001f469\u200d"])
def test_b41_odd_characters_round_trip(server: LiveServer, text: str) -> None:
    answer = server.post(prompt=text, echo=True, max_tokens=0).json()
    assert answer["choices"][0]["text"] == text
    ids = server.post("/tokenize", prompt=text).json()["tokens"]
    assert server.post("/detokenize", tokens=ids).json()["prompt"] == text


def test_model_names(server: LiveServer) -> None:
    assert server.post(prompt="a", model="toy").status_code == 200
    error = assert_refused(server.post(prompt="a", model="other"), status=404, param="model")
    assert error["code"] == "model_not_found"


def test_b29_every_token_biased_away_is_accepted(server: LiveServer) -> None:
    bias = {str(i): -100 for i in range(320)}
    assert server.post(prompt="a", logit_bias=bias, max_tokens=2).status_code == 200
    assert len(server.engine.submitted[-1].logit_bias) == 320
