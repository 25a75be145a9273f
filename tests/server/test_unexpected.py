"""What nobody expected is answered in our envelope too, and no reader holds a place for ever."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from server import runner
from server.app import create_app
from server.completions import CompletionCall
from server.config import ServerConfig
from tests.server.fake_engine import EOS, FakeEngine
from tests.server.live_server import LiveServer, live_server, make_tokenizer
from tests.server.raw_http import raw_post


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a secret of ours")


def test_a_bug_is_answered_in_the_envelope(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The framework answered in plain text before the edge could."""
    monkeypatch.setattr(server.engine, "submit_all", broken)
    answer = server.post(prompt="a")
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert answer.headers["x-request-id"] in error["message"]
    assert "secret" not in answer.text


def test_a_bug_in_mid_stream_is_an_event_and_done(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompletionCall, "chunk", broken)
    answer = server.post(prompt="a", stream=True)
    *_, error, done, rest = answer.text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert (done, rest) == ("data: [DONE]", "")
    assert not server.engine.live
    page = httpx.get(server.url + "/metrics").text
    assert 'requests_finished_total{model_name="toy",reason="error"} 1.0' in page


ENDLESS = {
    "prompt": "a",
    "max_tokens": 200_000,
    "stream": True,
    "logprobs": 20,
    "ignore_eos": True,
}


@pytest.mark.parametrize(
    ("path", "body"),
    [("/detokenize", {"tokens": [EOS] * 1_000_000}), ("/v1/completions", ENDLESS)],
    ids=["whole", "stream"],
)
def test_a_reader_that_takes_nothing_loses_its_connection(
    tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    """Closing waited until all was written, so such readers used up the connections."""
    with live_server(tmp_path, slow_reader_seconds=1.0, max_connections=1) as server:
        info = server.engine.info
        server.engine.info = msgspec.structs.replace(info, max_model_len=10**6)

        def others_get_in() -> bool:
            return httpx.get(server.url + "/version").status_code == 200

        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect(("127.0.0.1", server.port))
            stalled.sendall(raw_post(path, **body))
            assert b" 200 " in stalled.recv(100)
            assert not others_get_in()
            server.until(others_get_in)


def test_a_reader_that_takes_nothing_does_not_keep_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After draining, the server waited for it for as long as a slow reader is borne."""
    monkeypatch.setattr(runner, "CLOSE_SECONDS", 0.1)
    tokenizer = make_tokenizer(tmp_path)
    config = ServerConfig.resolve({"model": tmp_path, "port": 0}, tmp_path)
    engine = FakeEngine(tokenizer, max_model_len=10**6)

    async def main() -> None:
        listener = runner.bind(config.host, config.port)
        app = create_app(engine, tokenizer, config)
        server = runner._Server(runner._uvicorn_config(config, app))
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        host, port = listener.getsockname()
        reader, writer = await asyncio.open_connection(host, port, limit=1024)
        writer.write(raw_post("/v1/completions", **ENDLESS))
        await reader.readline()
        server.should_exit = True
        async with asyncio.timeout(30):
            await serving
        writer.close()

    asyncio.run(main())
    assert not engine.live
