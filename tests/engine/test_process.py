"""The supervisor with real engine processes around the toy model."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from engine.child import EngineChild
from engine.client import Engine, Generation
from engine.config import EngineConfig
from engine.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    EngineUnavailableError,
    QueueFullError,
    RequestError,
)
from engine.ipc import reports_path, requests_path
from engine.messages import RequestUpdate
from engine.process import EngineProcess
from engine.request import SamplingParams
from engine.supervision import RestartBudget, SupervisionPolicy
from tests.engine.fake_engine import launch_toy
from tests.engine.fake_runner import HANG, KILL, NOT_FINITE, RAISE, toy_generate
from tests.engine.oracle import Oracle
from tests.engine.tiny_checkpoint import TinyModel, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE = 100.0  # generous: the machine may be busy; nothing waits for it when all is well
POLICY = SupervisionPolicy(first_backoff=0.01, max_backoff=0.02, stop_seconds=DEADLINE)


def make_engine(
    model: str = "toy", policy: SupervisionPolicy = POLICY, **kwargs: Any
) -> EngineProcess:
    config = EngineConfig(model=model)
    return EngineProcess(config, policy=policy, launch=launch_toy, **kwargs)


@asynccontextmanager
async def running(**kwargs: Any) -> AsyncIterator[EngineProcess]:
    engine = make_engine(**kwargs)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def run(test: Callable[[], Any]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the state of another process has no event
        await asyncio.sleep(0.005)


async def finish(generation: Generation) -> RequestUpdate:
    while True:
        update = await generation.next_update()
        assert update is not None
        if update.finish_reason is not None:
            return update


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)


def test_generates_for_several_requests_and_stops_without_a_trace() -> None:
    async def test() -> None:
        async with running() as engine:
            border: Engine = engine
            assert border.state == "ready"
            assert border.info.vocab_size == 100
            prompts = [[n, n + 1, 3] for n in range(12)]
            generations = [border.submit(p, greedy(10)) for p in prompts]
            for prompt, generation in zip(prompts, generations, strict=True):
                last = await finish(generation)
                assert generation.output == toy_generate(prompt, 10)
                assert last.finish_reason == "length"
                assert last.timing is not None
            assert border.stats.generated_tokens == 120
            pid = engine.pid
            assert pid is not None
            folder = channel_folder(engine)
        assert engine.state == "dead"
        assert not psutil.pid_exists(pid)
        folders.append(folder)

    folders: list[str] = []
    run(test)
    assert not Path(folders[0]).exists()


def channel_folder(engine: EngineProcess) -> str:
    child = engine._child
    assert isinstance(child, EngineChild)
    return child._channel.folder


def test_abort_frees_the_engine_and_the_queue() -> None:
    async def test() -> None:
        async with running() as engine:
            generation = engine.submit([1, 2], greedy(120))
            await generation.next_update()
            generation.abort()
            generation.abort()
            await until(lambda: engine.stats.running == 0 and engine.stats.full_used == 0)
            await finish(engine.submit([3], greedy(2)))

    run(test)


@pytest.mark.parametrize("poison", [RAISE, KILL], ids=["F08 exception in a step", "F01 kill -9"])
def test_a_crash_fails_live_requests_and_the_restarted_engine_works(poison: int) -> None:
    async def test() -> None:
        async with running() as engine:
            first_pid = engine.pid
            await finish(engine.submit([4, 4], greedy(5)))
            tokens_before = engine.stats.generated_tokens
            victim = engine.submit([poison], greedy(5))
            with pytest.raises(EngineUnavailableError) as caught:
                await finish(victim)
            assert caught.value.retry_after >= 1
            await until(lambda: engine.state == "ready")
            assert engine.restarts == 1
            assert engine.pid != first_pid
            generation = engine.submit([7, 8], greedy(6))
            await finish(generation)
            assert generation.output == toy_generate([7, 8], 6)
            assert engine.stats.generated_tokens == tokens_before + 6, "totals never fall"

    run(test)


def test_f01_killed_from_outside_in_decode() -> None:
    async def test() -> None:
        async with running() as engine:
            generation = engine.submit([1], greedy(120))
            await generation.next_update()
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(EngineUnavailableError):
                await finish(generation)
            assert generation.output == toy_generate([1], len(generation.output)), "for a replay"
            with pytest.raises(EngineUnavailableError, match="restarting"):
                engine.submit([1], greedy(1))
            await until(lambda: engine.state == "ready")
            await finish(engine.submit([1], greedy(1)))

    run(test)


def test_f04_a_hang_is_noticed_by_silence_and_ends_in_a_restart() -> None:
    async def test() -> None:
        policy = SupervisionPolicy(silence_seconds=2.0, stop_seconds=DEADLINE)
        async with running(policy=policy) as engine:
            pid = engine.pid
            victim = engine.submit([HANG], greedy(5))
            with pytest.raises(EngineUnavailableError):
                await finish(victim)
            await until(lambda: engine.state == "ready")
            assert engine.pid != pid
            await finish(engine.submit([1], greedy(1)))

    run(test)


def test_an_idle_engine_shows_signs_of_life() -> None:
    async def test() -> None:
        async with running() as engine:
            signs: set[float] = set()
            while len(signs) < 3:
                signs.add(engine._last_sign)
                assert engine.restarts == 0
                await asyncio.sleep(0.02)

    run(test)


def test_f07_values_that_are_not_finite_end_only_their_request() -> None:
    async def test() -> None:
        async with running() as engine:
            bad = engine.submit([5, NOT_FINITE, 6], greedy(5))
            good = engine.submit([5, 6, 7], greedy(5))
            assert (await finish(bad)).finish_reason == "error"
            await finish(good)
            assert good.output == toy_generate([5, 6, 7], 5)
            assert engine.restarts == 0

    run(test)


def test_the_restart_budget_ends_in_dead() -> None:
    async def test() -> None:
        policy = SupervisionPolicy(max_restarts=2, first_backoff=0.01, stop_seconds=DEADLINE)
        async with running(policy=policy) as engine:
            for _ in range(3):
                await until(lambda: engine.state == "ready")
                with pytest.raises(EngineUnavailableError):
                    await finish(engine.submit([KILL], greedy(1)))
            await until(lambda: engine.state == "dead")
            assert engine.restarts == 2
            with pytest.raises(EngineUnavailableError, match="dead"):
                engine.submit([1], greedy(1))

    run(test)


def test_f27_a_folder_that_is_gone_at_the_restart_ends_in_dead(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "model").touch()
        async with running(model=f"once:{tmp_path / 'model'}") as engine:
            with pytest.raises(EngineUnavailableError):
                await finish(engine.submit([KILL], greedy(1)))
            await until(lambda: engine.state == "dead")

    run(test)


def test_the_real_engine_answers_as_the_oracle_and_survives_a_kill(tmp_path: Path) -> None:
    model = TinyModel()
    folder = write_checkpoint(tmp_path / "tiny", model)
    prompt = [7, 11, 13] * 12
    params = greedy(6, ignore_eos=True)
    expected = Oracle(folder, model).generate(prompt, params)
    assert expected.blocks_dropped > 0

    async def test() -> None:
        config = EngineConfig(model=str(folder), device="cpu", threads=1, max_num_seqs=4)
        engine = EngineProcess(config, policy=POLICY)
        await engine.start()
        try:
            assert engine.info.attention == "sparse"
            assert engine.info.vocab_size == model.vocab
            for restarts in (0, 1):
                await until(lambda: engine.state == "ready")
                assert engine.restarts == restarts
                generation = engine.submit(prompt, params)
                await finish(generation)
                assert generation.output == expected.tokens
                if not restarts:
                    assert engine.pid is not None
                    os.kill(engine.pid, signal.SIGKILL)
                    await until(lambda: engine.state == "restarting")
        finally:
            await engine.stop()

    run(test)


def test_the_real_engine_names_the_folder_that_is_missing(tmp_path: Path) -> None:
    async def test() -> None:
        engine = EngineProcess(EngineConfig(model=str(tmp_path / "nothing")), policy=POLICY)
        with pytest.raises(CheckpointError, match="nothing: no such folder") as caught:
            await engine.start()
        assert "\n" not in str(caught.value)

    run(test)


LOAD_FAILURES: dict[str, tuple[type[EngineError], str]] = {
    "no-folder": (CheckpointError, "no-folder: there is no config.json"),
    "too-small": (ConfigError, "kv_cache_bytes must be at least 1000, got 1"),
    "crash-at-load": (EngineError, "ended with exit code 7"),
    "bug-at-load": (EngineError, "ZeroDivisionError: nobody expected this"),
    "hang-at-load": (EngineError, "said nothing for 3 s"),
}


@pytest.mark.parametrize("model", LOAD_FAILURES)
def test_an_engine_that_cannot_start_says_why_in_one_line(model: str) -> None:
    kind, message = LOAD_FAILURES[model]

    async def test() -> None:
        load_seconds = 3.0 if model == "hang-at-load" else DEADLINE
        engine = make_engine(model, SupervisionPolicy(load_seconds=load_seconds))
        with pytest.raises(kind, match=message) as caught:
            await engine.start()
        assert "\n" not in str(caught.value)
        assert engine.state == "dead"
        assert engine.pid is None, "nothing is left running"
        await engine.stop()

    run(test)


@pytest.mark.parametrize("side", [requests_path, reports_path], ids=["to engine", "from engine"])
def test_f24_a_frame_of_another_version_is_treated_as_a_crash(side: Callable[[str], str]) -> None:
    async def test() -> None:
        async with running() as engine:
            pid = engine.pid
            context = zmq.Context()
            with context.socket(zmq.PUSH) as sender:
                sender.connect(f"ipc://{side(channel_folder(engine))}")
                sender.send_multipart([b"RTPB\x63\x00\x00\x00", b"\xc0"])
                await until(lambda: engine.restarts == 1 and engine.state == "ready")
            context.term()
            assert engine.pid != pid
            await finish(engine.submit([1], greedy(1)))

    run(test)


def test_a_full_queue_is_refused_with_the_seconds_to_wait() -> None:
    async def test() -> None:
        async with running(max_queued_requests=3) as engine:
            generations = [engine.submit([1, n], greedy(3)) for n in range(3)]
            with pytest.raises(QueueFullError) as caught:
                engine.submit([9], greedy(1))
            assert caught.value.retry_after >= 1
            generations.pop().abort()
            generations.append(engine.submit([9], greedy(1)))
            for generation in generations:
                await finish(generation)
            await finish(engine.submit([9], greedy(1)))

    run(test)


def test_token_ids_that_do_not_fit_are_refused_at_once() -> None:
    async def test() -> None:
        async with running() as engine:
            with pytest.raises(RequestError):
                engine.submit([2**31], greedy(1))
            over = engine.submit([100], greedy(1))
            assert (await finish(over)).finish_reason == "error"

    run(test)


def test_drain_refuses_new_work_and_lets_live_requests_end() -> None:
    async def test() -> None:
        async with running() as engine:
            generation = engine.submit([2], greedy(50))
            draining = asyncio.create_task(engine.drain(DEADLINE))
            await until(lambda: engine.state == "draining")
            with pytest.raises(EngineUnavailableError, match="draining"):
                engine.submit([3], greedy(1))
            await draining
            assert generation.output == toy_generate([2], 50)

    run(test)


def test_stop_fails_what_is_live() -> None:
    async def test() -> None:
        async with running() as engine:
            generation = engine.submit([HANG], greedy(5))
            engine._policy = SupervisionPolicy(stop_seconds=0.1)
            await engine.stop()
            with pytest.raises(EngineUnavailableError, match="stopped"):
                await finish(generation)

    run(test)


def test_methods_before_start_say_that_the_model_is_loading() -> None:
    async def test() -> None:
        engine = make_engine()
        assert engine.state == "loading"
        with pytest.raises(EngineUnavailableError):
            _ = engine.info
        with pytest.raises(EngineUnavailableError, match="loading"):
            engine.submit([1], greedy(1))

    run(test)


PARENT = """
import asyncio, sys
from engine.config import EngineConfig
from engine.process import EngineProcess
from tests.engine.fake_engine import launch_toy

async def main():
    engine = EngineProcess(EngineConfig(model="toy"), launch=launch_toy)
    await engine.start()
    print(engine.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


def test_f23_a_killed_front_end_leaves_no_engine_behind() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.ppid() == parent.pid
        killed = time.monotonic()
        parent.kill()
        child.wait(timeout=DEADLINE)
        assert time.monotonic() - killed < DEADLINE


def test_an_engine_without_a_front_end_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "engine.core"], input=b"", cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "started by the front end" in capfd.readouterr().err


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_restart_budget_slides_and_backs_off_on_a_faked_clock() -> None:
    """F18: only differences of the injected clock matter, never where it stands."""
    for start in (-86400.0, 0.0, 1e9):
        clock = Clock(start)
        budget = RestartBudget(
            SupervisionPolicy(max_restarts=4, restart_window=600, first_backoff=1, max_backoff=3),
            clock,
        )
        assert [budget.spend() for _ in range(5)] == [0.0, 1.0, 2.0, 3.0, None]
        clock.now += 599
        assert budget.spend() is None
        clock.now += 1
        assert budget.spend() == 0.0
