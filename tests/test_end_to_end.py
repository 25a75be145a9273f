"""The whole path as a user has it: `rtpurbo serve` in a process of its own, asked over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from tokenizers import Tokenizer

from benchmarks.server_process import ServerProcess, serving
from conversion.code_facts import FactDocument, fact_documents
from conversion.text_source import TextSource
from engine.embedded import embedded_model_path

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving(str(embedded_model_path()), "--max-num-seqs", "8") as server:
        yield server


def complete(server: ServerProcess, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "temperature": 0, **fields}
    answer = httpx.post(server.url + "/v1/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


@pytest.fixture(scope="module")
def document() -> FactDocument:
    """16K tokens of real Python source, with eight facts in it."""
    tokenizer = Tokenizer.from_file(str(embedded_model_path() / "tokenizer.json"))
    (made,) = fact_documents(
        TextSource.find(None),
        tokenizer,
        kind="constant",
        count=1,
        facts=8,
        tokens=16_000,
        seed=3,
    )
    return made


def test_planted_facts_are_answered_over_16k_tokens(
    server: ServerProcess, document: FactDocument
) -> None:
    right = asked = 0
    for question in document.questions:
        answer = complete(server, document.text + question.text, max_tokens=5)
        right += answer["choices"][0]["text"] == question.answer
        asked += 1
        usage = answer["usage"]
        assert usage["prompt_tokens"] > 15_500
        fraction = answer["metrics"]["attended_fraction"]
        assert 0 < fraction < 0.5, "retrieval heads select a small part of the context"
        tokens = answer["metrics"]["attended_tokens_mean"]
        assert tokens == pytest.approx(fraction * usage["prompt_tokens"], rel=0.01)
    assert asked == 8
    assert right >= 6, f"{right} of {asked}"


def test_questions_to_one_document_share_its_prefix(
    server: ServerProcess, document: FactDocument
) -> None:
    complete(server, document.text + document.questions[0].text, max_tokens=1)
    again = complete(server, document.text + document.questions[1].text, max_tokens=1)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 15_000


def test_b77_short_requests_are_answered_while_long_prompts_are_computed(
    server: ServerProcess, document: FactDocument
) -> None:
    """The long ones are new to the prefix cache; the short one must not wait for them."""
    text = document.text[: len(document.text) // 2]

    async def race() -> tuple[float, float]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
            loop = asyncio.get_running_loop()

            async def ask(prompt: str) -> float:
                body = {"prompt": prompt, "max_tokens": 1}
                (await client.post("/v1/completions", json=body)).raise_for_status()
                return loop.time()

            long = [asyncio.create_task(ask(f"# {i}\n{text}")) for i in range(2)]
            while (  # noqa: ASYNC110 - the gauge of another process has no event
                (await client.get("/metrics"))
                .text.split('rtpurbo_requests_running{model_name="code-11m-sparse"} ')[1]
                .startswith("0")
            ):
                await asyncio.sleep(0.05)
            short = await ask("import os\n")
            return short, min(await asyncio.gather(*long))

    short, long = asyncio.run(race())
    assert short < long


def test_b79_the_same_prompt_many_times_shares_its_pages(server: ServerProcess) -> None:
    prompt = "def mean(values):\n    return sum(values) / " * 40
    answer = complete(server, [prompt] * 16, max_tokens=4)
    assert len({choice["text"] for choice in answer["choices"]}) == 1
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0.8 * answer["usage"]["prompt_tokens"]


def test_the_official_client(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        (model,) = client.models.list().data
        prompt = "def add(a, b):\n    "
        whole = client.completions.create(
            model=model.id, prompt=prompt, max_tokens=24, temperature=0, logprobs=2
        )
        chunks = client.completions.create(
            model=model.id, prompt=prompt, max_tokens=24, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert all(value is not None and value <= 0 for value in logprobs.token_logprobs)


def test_f01_killed_in_sparse_decode_the_text_is_the_same(
    server: ServerProcess, document: FactDocument
) -> None:
    """Generated tokens are computed again under the decode rule, so the blocks they saw stay."""
    prompt = document.text[:12_000]
    fields = {"max_tokens": 96, "logprobs": 1, "ignore_eos": True}
    whole = complete(server, prompt, **fields)
    assert whole["usage"]["prompt_tokens"] > 3_000
    assert whole["metrics"]["attended_fraction"] < 0.9, "retrieval heads select"
    chunks: list[dict[str, Any]] = []
    body = {"prompt": prompt, "temperature": 0, "stream": True, **fields}
    body["stream_options"] = {"include_usage": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=300) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: ")))
                if len(chunks) == 10:
                    (engine,) = psutil.Process(server.pid).children()
                    engine.kill()
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    logprobs = [p for choice in choices for p in choice["logprobs"]["token_logprobs"]]
    want = whole["choices"][0]["logprobs"]["token_logprobs"]
    assert logprobs == pytest.approx(want, abs=1e-3)
    last = chunks[-1]
    attended = whole["metrics"]["attended_tokens_mean"]
    assert last["metrics"]["attended_tokens_mean"] == pytest.approx(attended, rel=0.01)
    cached = last["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 2_500, "as the engine that died had found it"
    resumed = httpx.get(server.url + "/metrics").text.split("rtpurbo_requests_resumed_total{")[1]
    assert resumed.split()[1] == "1.0", "it was killed before the end"


def test_dense_serving_of_the_converted_model() -> None:
    with serving(str(embedded_model_path()), "--attention", "dense") as dense:
        answer = complete(dense, "x = 1\n" * 400, max_tokens=4)
        assert answer["metrics"]["attended_fraction"] is None
        model = httpx.get(dense.url + "/v1/models").json()["data"][0]
    assert model["attention"] == "dense"
    assert model["kv_bytes_per_token"] == model["kv_bytes_per_token_dense"]


def test_kv_bytes_per_token_are_far_below_dense(server: ServerProcess) -> None:
    model = httpx.get(server.url + "/v1/models").json()["data"][0]
    assert 2 * model["kv_bytes_per_token"] <= model["kv_bytes_per_token_dense"]


def test_a_bad_folder_ends_with_one_line(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "serve", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "config.json" in done.stderr
