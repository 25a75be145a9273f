"""Engine deaths as clients see them: a real server process, the toy engine, answers over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.server_process import ServerProcess
from engine.tokenizer import Tokenizer
from tests.engine.fake_runner import KILL, toy_generate
from tests.server.answer_stream import Stream, ask_all, until
from tests.server.toy_folder import write_toy_folder
from tests.server.toy_server import toy_server

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parent.parent.parent
SEED = 41
DRAWN_PROMPT = [5, 8, 13]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy") / "model"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    policy = {"max_restarts": 100, "first_backoff": 0.01, "silence_seconds": 3.0}
    settings = {"keep_alive_seconds": 0.1, "stall_seconds": 0.9}
    with toy_server(folder, step_seconds=0.05, policy=policy, **settings) as server:
        yield server


def engine_of(server: ServerProcess) -> psutil.Process:
    (child,) = psutil.Process(server.pid).children()
    return child


def wait_ready(server: ServerProcess) -> None:
    while httpx.get(server.url + "/health/ready").status_code != 200:
        time.sleep(0.05)


def metric(server: ServerProcess, name: str) -> float:
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    (value,) = (line.split()[-1] for line in lines if line.startswith(f"rtpurbo_{name}{{"))
    return float(value)


def bodies(folder: Path) -> list[dict[str, Any]]:
    """Drawn with a stop string, greedy, echo with log-probabilities, and one that is no stream."""
    tokenizer = Tokenizer.from_folder(folder)
    text = tokenizer.decode(toy_generate(DRAWN_PROMPT, 80, SEED))
    stop = next(text[i : i + 2] for i in range(55, 70) if text.find(text[i : i + 2]) == i)
    drawn = {"prompt": DRAWN_PROMPT, "seed": SEED, "max_tokens": 80, "stop": [stop]}
    greedy = {"prompt": [1, 2], "temperature": 0, "max_tokens": 60}
    echo = {"prompt": [*range(88)], "temperature": 0, "max_tokens": 30, "echo": True}
    plain = {"prompt": [7], "temperature": 0, "max_tokens": 70, "logprobs": 0}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return [
        {**drawn, "logprobs": 2, **streamed},
        {**greedy, **streamed},
        {**echo, "logprobs": 1, **streamed},
        plain,
    ]


def fresh(server: ServerProcess) -> None:
    """A cold engine, so that the prefix cache is the same at the start of each run."""
    before = metric(server, "engine_restarts_total")
    engine_of(server).kill()
    while metric(server, "engine_restarts_total") == before:
        time.sleep(0.05)
    wait_ready(server)


@pytest.fixture(scope="module")
def undisturbed(server: ServerProcess, folder: Path) -> list[dict[str, Any]]:
    fresh(server)
    answers = [stream.answer() for stream in asyncio.run(ask_all(server, bodies(folder)))]
    assert answers[0]["finish"] == ["stop"], "the stop string"
    assert all(answer["usage"] and answer["attended"][0] for answer in answers)
    assert answers[0]["usage"]["completion_tokens"] > 40
    assert "\\ufffd" in json.dumps(answers[1]["text"]), "broken characters"
    assert len(answers[2]["logprobs"]["token_logprobs"]) == 88 + 30
    return answers


@pytest.mark.parametrize("when", ["F01 in decode", "F02 in prefill"])
def test_killed_in_the_middle_every_answer_is_as_if_nothing_had_happened(
    server: ServerProcess, folder: Path, undisturbed: list[dict[str, Any]], when: str
) -> None:
    async def kill(streams: list[Stream]) -> None:
        if when == "F01 in decode":
            await until(lambda: all(len(stream.chunks) > 5 for stream in streams[:2]))
            await until(lambda: len(streams[2].chunks) > 1)
        engine_of(server).kill()
        await until(lambda: all(stream.pauses for stream in streams[:3]))
        assert not any(stream.done for stream in streams)

    fresh(server)
    time.sleep(1.1)  # the metrics page is made once a second
    resumed = metric(server, "requests_resumed_total")
    streams = asyncio.run(ask_all(server, bodies(folder), kill))
    for stream, want in zip(streams, undisturbed, strict=True):
        assert stream.answer() == want
    time.sleep(1.1)
    assert metric(server, "requests_resumed_total") == resumed + 4


def test_f04_health_tells_the_truth_while_the_engine_hangs(server: ServerProcess) -> None:
    """Probes never wait for the engine; a stopped one is denied, replaced, and ready again."""

    async def hang(streams: list[Stream]) -> None:
        await until(lambda: len(streams[0].chunks) > 3)
        os.kill(engine_of(server).pid, signal.SIGSTOP)
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            seen, times = set(), []
            while "restarting" not in seen:
                begun = time.monotonic()
                assert (await client.get("/health/live")).status_code == 200
                times.append(time.monotonic() - begun)
                seen.add((await client.get("/health/ready")).json()["status"])
                await asyncio.sleep(0.1)
            assert seen >= {"stalled", "restarting"}
            assert min(times) < 0.1
            refused = await client.post("/v1/completions", json={"prompt": [1]})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1

    body = {"prompt": [3, 3], "temperature": 0, "max_tokens": 60, "stream": True}
    (stream,) = asyncio.run(ask_all(server, [body], hang))
    assert stream.done
    whole = httpx.post(
        server.url + "/v1/completions", json={**body, "stream": False}, timeout=60
    ).json()
    text = "".join(choice["text"] for chunk in stream.chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["text"]
    wait_ready(server)


def test_f03_poison_gets_a_500_its_retry_a_400_and_others_nothing(
    server: ServerProcess, folder: Path
) -> None:
    async def poison(streams: list[Stream]) -> None:
        await until(lambda: len(streams[0].chunks) > 3)
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            body = {"prompt": [4, KILL], "max_tokens": 5}
            first = await client.post("/v1/completions", json=body)
            assert first.status_code == 500
            assert first.json()["error"]["code"] == "request_failed"
            again = await client.post("/v1/completions", json=body)
            while again.status_code == 503:  # its last engine is being replaced
                await asyncio.sleep(0.1)
                again = await client.post("/v1/completions", json=body)
            assert again.status_code == 400
            assert again.json()["error"]["code"] == "refused_after_failure"

    body = {"prompt": [9, 1], "temperature": 0, "max_tokens": 100, "stream": True}
    (stream,) = asyncio.run(ask_all(server, [body], poison))
    text = "".join(choice["text"] for chunk in stream.chunks for choice in chunk["choices"])
    tokenizer = Tokenizer.from_folder(folder)
    assert text == tokenizer.decode(toy_generate([9, 1], 100))


async def events(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def test_a_spent_budget_ends_the_server_with_one_line(tmp_path: Path) -> None:
    """Live requests are told first; then the process ends, because serving 503 helps nobody."""
    write_toy_folder(tmp_path / "model", step_seconds=0.05)
    options = json.dumps({"policy": {"max_restarts": 0}, "settings": {}})
    program = [sys.executable, "-m", "tests.server.toy_server", str(tmp_path / "model")]
    with subprocess.Popen(
        [*program, "--port", "0", options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        serving = next(line for line in process.stdout if line.startswith("serving"))
        url = serving.split(" on ")[1].strip()

        async def ask() -> list[str]:
            body = {"prompt": [1], "max_tokens": 100, "stream": True}
            async with (
                httpx.AsyncClient(timeout=60) as client,
                client.stream("POST", url + "/v1/completions", json=body) as response,
            ):
                got: list[str] = []
                async for data in events(response):
                    if not got:
                        psutil.Process(process.pid).children()[0].kill()
                    got.append(data)
                return got

        got = asyncio.run(ask())
        assert process.wait(60) == 1
        last = process.stderr.read().splitlines()[-1]
    assert json.loads(got[-2])["error"]["code"] == "engine_unavailable"
    assert got[-1] == "[DONE]"
    assert last.startswith("error: the engine is given up: it was lost 1 times within 600 s")
    assert "killed by signal 9" in last


def test_f13_a_drain_in_the_middle_of_a_restart_waits_for_what_goes_on(tmp_path: Path) -> None:
    """The engine dies, then SIGTERM comes: the stream is resumed, ends whole, and all is left."""
    body = {"prompt": [3, 1], "temperature": 0, "max_tokens": 60, "stream": True}

    async def disturb(streams: list[Stream]) -> None:
        await until(lambda: len(streams[0].chunks) > 3)
        engine_of(own).kill()
        await until(lambda: streams[0].pauses)
        psutil.Process(own.pid).terminate()

    with toy_server(tmp_path / "model", step_seconds=0.05, keep_alive_seconds=0.1) as own:
        (stream,) = asyncio.run(ask_all(own, [body], disturb))
        assert psutil.Process(own.pid).wait(60) == 0
    text = "".join(choice["text"] for chunk in stream.chunks for choice in chunk["choices"])
    tokenizer = Tokenizer.from_folder(tmp_path / "model")
    assert text == tokenizer.decode(toy_generate([3, 1], 60))
    assert stream.answer()["finish"] == ["length"]
