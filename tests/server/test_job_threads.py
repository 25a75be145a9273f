"""F10: a job that fails, panics or hangs costs its own request, and nobody else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from engine.tokenizer import Tokenizer
from server.choice import Choice
from server.errors import ApiError
from server.job_threads import JobThreads
from tests.server.live_server import LiveServer, live_server


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(bounded())


class Panic(BaseException):
    """As PyO3 raises when Rust code panics: no Exception."""


def panic(*_: Any, **__: Any) -> Any:
    raise Panic("at a place in memory")


def test_f10_results_and_errors_come_back() -> None:
    async def test() -> None:
        jobs = JobThreads(2, seconds=30)
        assert await jobs.run(lambda a, b: a + b, 1, 2) == 3
        for error in (ValueError, KeyError, RecursionError):

            def fail(kind: type[Exception] = error) -> None:
                raise kind("no")

            with pytest.raises(error):
                await jobs.run(fail)
        for wrapped in (panic, lambda: next(iter(()))):
            with pytest.raises(RuntimeError, match=r"a job ended with (Panic|StopIteration)"):
                await jobs.run(wrapped)
        assert await jobs.run(int) == 0

    run(test)


def test_f10_a_hung_job_is_left_behind_and_its_place_given_on() -> None:
    async def test() -> None:
        release = threading.Event()
        jobs = JobThreads(1, seconds=0.05, most_stuck=2)
        for stuck in (1, 2):
            with pytest.raises(ApiError) as caught:
                await jobs.run(release.wait)
            assert (caught.value.status, caught.value.code) == (400, "too_slow")
            assert jobs.stuck == stuck
            if stuck == 1:
                assert await jobs.run(int) == 0, "the place is free again"
        with pytest.raises(ApiError) as caught:
            await jobs.run(int)
        assert caught.value.status == 503, "threads are not wasted without end"
        release.set()
        while jobs.stuck:  # noqa: ASYNC110 - threads have no event of this loop
            await asyncio.sleep(0.005)
        assert await jobs.run(int) == 0

    run(test)


def test_b71_a_caller_that_leaves_does_not_free_a_place_that_is_in_use() -> None:
    """Else clients that disconnect could start any number of threads."""

    async def test() -> None:
        release, started = threading.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        jobs = JobThreads(1, seconds=30)

        def job() -> None:
            loop.call_soon_threadsafe(started.set)
            release.wait()

        caller = asyncio.create_task(jobs.run(job))
        await started.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        ran: list[int] = []
        gone = asyncio.create_task(jobs.run(ran.append, 1))
        waiting = asyncio.create_task(jobs.run(ran.append, 2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0.05)
        assert not ran
        release.set()
        await waiting
        assert ran == [2], "who left while waiting is not served"

    run(test)


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a secret of ours")


@pytest.mark.parametrize("fault", [broken, panic], ids=["exception", "panic"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_f10_a_broken_tokenizer_fails_the_request_alone(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, path: str, fault: Any
) -> None:
    monkeypatch.setattr(Tokenizer, "encode_at_most", fault)
    fields = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    answer = server.post(path, **fields)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert answer.headers["x-request-id"] in error["message"]
    assert "secret" not in answer.text
    assert server.post(prompt=[70], max_tokens=1).status_code == 200, "others need no tokenizer"


def test_f10_a_hung_tokenizer_does_not_hold_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    encode = Tokenizer.encode_at_most

    def hang(self: Tokenizer, limit: int, text: str, **options: Any) -> Any:
        if text == "hang":
            release.wait(60)
        return encode(self, limit, text, **options)

    monkeypatch.setattr(Tokenizer, "encode_at_most", hang)
    with live_server(tmp_path, job_seconds=0.6) as server:
        for _ in range(6):  # more than there are places
            answer = server.post(prompt="hang", max_tokens=1)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_slow")
        assert server.post(prompt="a", max_tokens=1).status_code == 200
        release.set()
        assert not server.engine.live


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
def test_f10_a_broken_detokenizer_fails_the_request_alone(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    push = Choice.push

    def fail(self: Choice, update: Any) -> Any:
        if self.generation.params.seed == 666:
            raise RuntimeError("a secret of ours")
        return push(self, update)

    monkeypatch.setattr(Choice, "push", fail)
    before = len(server.engine.aborted)
    monkeypatch.setattr(server.engine, "pause_after", 3)
    answer = server.post(prompt="a", seed=666, n=2, max_tokens=50, stream=streamed)
    assert answer.status_code == (200 if streamed else 500)
    assert "internal_error" in answer.text
    assert "secret" not in answer.text
    server.until(lambda: not server.engine.live)
    server.call(server.engine.running.set)
    assert server.post(prompt="a", seed=1, max_tokens=2).status_code == 200
    assert len(server.engine.aborted) > before
