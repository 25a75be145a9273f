"""The application behind a real uvicorn on a loopback port, in a thread, around a fake engine."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvloop

from engine.tokenizer import Tokenizer
from server.app import create_app
from server.config import ServerConfig
from server.recorder import Observer
from server.runner import _Server, _uvicorn_config, bind
from tests.engine.byte_tokenizer import byte_tokenizer
from tests.server.fake_engine import FakeEngine

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(folder: Path, *, chat: bool = True) -> Tokenizer:
    """A byte-level tokenizer of 320 ids: 64 special-looking ones, then the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer(320).save(str(folder / "tokenizer.json"))
    settings = {"chat_template": CHAT_TEMPLATE} if chat else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_folder(folder)


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A running server and what stands behind it."""

    port: int
    engine: FakeEngine
    tokenizer: Tokenizer
    config: ServerConfig
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(self, work: Callable[[], Any]) -> None:
        """Run something on the server's loop and wait for it."""
        done = threading.Event()

        def run() -> None:
            work()
            done.set()

        self.loop.call_soon_threadsafe(run)
        assert done.wait(10)

    def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for something that the server does by itself."""
        waiter = threading.Event()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return
            waiter.wait(0.01)
        raise AssertionError("it did not happen")

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=20)

    def send(self, raw: bytes, *, close: bool = False) -> bytes:
        """Write raw bytes to a new connection and read until the server closes it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(raw)
            if close:
                return b""
            chunks = []
            while chunk := connection.recv(65536):
                chunks.append(chunk)
            return b"".join(chunks)


@contextmanager
def live_server(
    folder: Path,
    *,
    chat: bool = True,
    dropped_lines: Callable[[], int] = int,
    observers: Sequence[Observer] = (),
    **settings: Any,
) -> Iterator[LiveServer]:
    """Serve until the block ends."""
    tokenizer = make_tokenizer(folder, chat=chat)
    flags = {"model": folder, "model_name": "toy", "port": 0, **settings}
    config = ServerConfig.resolve(flags, folder)
    started: list[LiveServer] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def main() -> None:
        engine = FakeEngine(tokenizer)
        listener = bind(config.host, config.port)
        app = create_app(engine, tokenizer, config, dropped_lines, observers)
        server = _Server(_uvicorn_config(config, app))
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        port = listener.getsockname()[1]
        started.append(LiveServer(port, engine, tokenizer, config, asyncio.get_running_loop()))
        ready.set()
        await stop.wait()
        server.should_exit = server.force_exit = True
        await serving

    def serve() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield started[0]
    finally:
        started[0].loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()
