"""The official client against a real server: what its users rely on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.live_server import LiveServer, live_server


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="toy", prompt="ab", max_tokens=7, temperature=0)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 7)
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].text) == 7


def test_streams_join_to_the_plain_answer(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="toy", prompt="ab", max_tokens=9, temperature=0)
    chunks = list(
        client.completions.create(
            model="toy",
            prompt="ab",
            max_tokens=9,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_logprobs_and_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="toy", prompt="abc", max_tokens=2, logprobs=2, echo=True, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.tokens[:3] == ["a", "b", "c"]
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert "".join(logprobs.tokens) == answer.choices[0].text


def test_n_stop_and_token_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="toy", prompt=[[70, 71], [72]], n=2, max_tokens=20, stop=["e", "a"], seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all("e" not in choice.text and "a" not in choice.text for choice in answer.choices)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "toy"
    assert client.models.retrieve("toy").id == "toy"
    extra = model.model_extra or {}
    assert extra["attention"] == "sparse"
    assert extra["retrieval_head_share"] == 0.125
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(
        model="toy",
        messages=messages,
        max_completion_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("<system>s<user>hi<assistant>")
    content = answer.choices[0].message.content
    assert content is not None
    assert len(content) == 6
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content
    assert tokens is not None
    assert "".join(token.token for token in tokens) == content
    assert len(tokens[0].top_logprobs) == 2
    chunks = list(
        client.chat.completions.create(
            model="toy",
            messages=messages,
            max_completion_tokens=6,
            temperature=0,
            stream=True,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_errors_are_the_clients_own(client: openai.OpenAI, server: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="toy", prompt="a", temperature=9)
    assert caught.value.param == "temperature"
    server.engine.state = "restarting"
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="toy", prompt="a")
    server.engine.state = "ready"
    server.engine.queue_limit = 0
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="toy", prompt="a")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        [{"role": "user"}],
        [{"role": "robot", "content": "a"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "assistant", "content": "a", "tool_calls": [{}]}],
        [{"role": "user", "content": 1}],
    ],
    ids=str,
)
def test_messages_that_cannot_be_rendered(server: LiveServer, messages: object) -> None:
    answer = server.post("/v1/chat/completions", messages=messages)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"


def test_known_chat_fields_that_are_not_supported(server: LiveServer) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert server.post("/v1/chat/completions", messages=messages, max_tokens=1).status_code == 200
    for field in ("tools", "response_format", "functions", "audio"):
        answer = server.post("/v1/chat/completions", messages=messages, **{field: [1]})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    with live_server(tmp_path, chat=False) as server:
        answer = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}])
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "no_chat_template"
