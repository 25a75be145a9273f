"""A server as a subject: what is asked, how answers are scored, what may go wrong."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from conversion.code_facts import FactDocument, Question
from conversion.errors import ConversionError
from conversion.evaluation.http_endpoint import HttpEndpoint
from conversion.evaluation.run import evaluate
from conversion.evaluation.samples import PromptSample, Sample
from tests.conversion.evaluation.small_evaluation import QUIET, options
from tests.engine.byte_tokenizer import byte_tokenizer

URL = "http://server.test:8000"
DOCUMENT = FactDocument(
    "A = 11111\nB = 22222\n",
    (Question("assert A == ", "11111"), Question("assert B == ", "22222")),
)
PROMPT = PromptSample("The key is Green.", ("green", "red"), generated_tokens=7)
Reply = Callable[[httpx.Request], httpx.Response]


def reply(text: str) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"text": text}]})


class FakeServer:
    """Knows one model and answers by a rule; keeps what it was asked."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[httpx.Headers] = []
        self.most_at_once = 0
        self._answer = answer
        self._at_once = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.headers.append(request.headers)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "small"}, {"id": "large"}]})
        assert request.url.path == "/v1/completions"
        body = json.loads(request.content)
        self.asked.append(body)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(0.001)
        self._at_once -= 1
        return reply(self._answer(body["prompt"]))


def endpoint(
    handler: Reply | Callable[[httpx.Request], Awaitable[httpx.Response]],
    url: str = URL,
    **options: Any,
) -> HttpEndpoint:
    transport = httpx.MockTransport(handler)  # type: ignore[arg-type]  # either kind is accepted
    return HttpEndpoint("server", url, byte_tokenizer(320), transport=transport, **options)


def look_up(prompt: str) -> str:
    """What a good model says."""
    asked = re.search(r"assert (\w) == $", prompt)
    if asked is None:
        return "GREEN and blue"
    value = re.search(rf"^{asked[1]} = (\d+)$", prompt, re.MULTILINE)
    assert value is not None
    return value[1]


@pytest.mark.parametrize("url", [URL, URL + "/", URL + "/v1", URL + "/v1/"])
def test_prompts_and_questions_are_asked_greedily(url: str) -> None:
    server = FakeServer(look_up)
    counted: list[int] = []
    subject = endpoint(server, url, api_key="secret")

    scores = subject.scores([PROMPT, DOCUMENT], lambda: counted.append(1))

    assert scores == [(0.5,), (1.0, 1.0)]
    assert len(counted) == 2
    first, second, third = sorted(server.asked, key=lambda body: -body["max_tokens"])
    assert first == {"model": "small", "prompt": PROMPT.prompt, "max_tokens": 7, "temperature": 0}
    assert {second["prompt"], third["prompt"]} == {
        DOCUMENT.text + question.text for question in DOCUMENT.questions
    }
    assert second["max_tokens"] == third["max_tokens"] == len("11111")  # one token per byte
    assert all(headers["authorization"] == "Bearer secret" for headers in server.headers)


def test_an_answer_must_come_at_once() -> None:
    server = FakeServer(lambda prompt: "is 11111" if "assert A" in prompt else "22222")
    assert endpoint(server).scores([DOCUMENT]) == [(0.0, 1.0)]


def test_a_model_may_be_named() -> None:
    server = FakeServer(look_up)
    endpoint(server, model="large").scores([PROMPT])
    assert [body["model"] for body in server.asked] == ["large"]


def test_so_many_requests_run_at_once_and_no_more() -> None:
    server = FakeServer(look_up)
    scores = endpoint(server, concurrency=3).scores([PROMPT, DOCUMENT] * 10)
    assert scores == [(0.5,), (1.0, 1.0)] * 10
    assert server.most_at_once == 3


def test_a_busy_server_is_asked_again() -> None:
    statuses = [503, 429]

    def handler(request: httpx.Request) -> httpx.Response:
        if statuses:
            return httpx.Response(statuses.pop(), headers={"retry-after": "0"})
        return reply("green red")

    assert endpoint(handler, model="m").scores([PROMPT]) == [(1.0,)]
    assert not statuses


def test_a_server_that_stays_busy_is_given_up() -> None:
    tries: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        tries.append(1)
        return httpx.Response(429, headers={"retry-after": "0"}, text="too\nmany")

    with pytest.raises(ConversionError, match=r"completions: status 429, too many$"):
        endpoint(handler, model="m").scores([PROMPT])
    assert len(tries) == 8


def refuse(request: httpx.Request) -> httpx.Response:
    return httpx.Response(400, json={"error": {"message": "prompt is too long"}})


def unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("connection refused")


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (refuse, "status 400, prompt is too long"),
        (unreachable, "connection refused"),
        (lambda request: httpx.Response(200, text="<html>"), "the answer is not JSON"),
        (lambda request: httpx.Response(200, json={"choices": []}), "the answer has no text"),
        (lambda request: httpx.Response(200, json=[1]), "the answer has no text"),
    ],
    ids=["refused", "unreachable", "html", "no choice", "a list"],
)
def test_what_goes_wrong_is_said_in_one_line(handler: Reply, message: str) -> None:
    samples: list[Sample] = [PROMPT, DOCUMENT, PROMPT]
    with pytest.raises(ConversionError, match=message) as caught:
        endpoint(handler, model="m").scores(samples)
    assert str(caught.value).startswith("http://server.test:8000/v1/completions: ")
    assert "\n" not in str(caught.value)


def test_a_server_without_models_is_refused() -> None:
    with pytest.raises(ConversionError, match="v1/models: no model is listed"):
        endpoint(lambda request: httpx.Response(200, json={"data": []})).scores([PROMPT])


def test_servers_are_compared_on_the_same_samples(dense_folder: Path, data: Path) -> None:
    asked: dict[str, set[str]] = {"good": set(), "bad": set()}

    def handler(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        asked[request.url.host].add(body["prompt"])
        name = re.search(r"assert (\w+) == $", body["prompt"])
        assert name is not None
        value = re.search(rf"^{name[1]} = (\d+)$", body["prompt"], re.MULTILINE)
        assert value is not None
        text = value[1] if request.url.host == "good" else "12"
        return httpx.Response(200, json={"choices": [{"text": text}]})

    found = evaluate(
        dense_folder,
        options(
            data,
            tasks=("code_constant",),
            urls=("bad=http://bad", "good=http://good/v1"),
            url_model="m",
            api_key="secret",
        ),
        QUIET,
        httpx.MockTransport(handler),
    )
    assert found.variants == ("bad", "good")
    assert [cell.differences["good"].value for cell in found.cells] == [1.0, 1.0]
    assert asked["good"] == asked["bad"]
    assert len(asked["good"]) == 2 + 4
    assert "secret" not in json.dumps(found.as_dict())


def test_what_a_server_says_of_its_attention_is_averaged() -> None:
    """Only of the newest scores, and only of answers that say it."""
    told: list[Any] = [0.5, None, 0.25, "missing", "other", "many"]

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "small"}]})
        value = told.pop(0)
        metrics: dict[str, Any] = {"metrics": {"attended_fraction": value}}
        if value in ("missing", "many"):  # none, or another server's
            metrics = {} if value == "missing" else {"metrics": [0.75]}
        return httpx.Response(200, json={"choices": [{"text": "11111"}], **metrics})

    subject = endpoint(handler, concurrency=1)
    subject.scores([DOCUMENT])
    assert subject.attended_fraction == 0.5
    subject.scores([PROMPT])
    assert subject.attended_fraction == 0.25
    for _ in range(3):
        subject.scores([PROMPT])
        assert subject.attended_fraction is None
