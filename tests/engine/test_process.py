"""The supervisor with real engine processes around the toy model."""

from __future__ import annotations

import ast
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

import msgspec
import psutil
import pytest
import zmq

from engine.child import EngineChild
from engine.client import Engine, Generation, Job
from engine.config import EngineConfig
from engine.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    EngineUnavailableError,
    PoisonError,
    QueueFullError,
    RequestError,
)
from engine.ipc import MAX_MESSAGE_BYTES, encode, reports_path, requests_path
from engine.messages import Report, RequestUpdate, Shutdown, Stats
from engine.process import EngineProcess
from engine.request import SamplingParams
from engine.supervision import RestartBudget, SupervisionPolicy
from tests.engine.fake_engine import launch_toy
from tests.engine.fake_runner import (
    HANG,
    KILL,
    NO_GRAPHS,
    NO_KERNELS,
    NOT_FINITE,
    RAISE,
    toy_generate,
)
from tests.engine.oracle import Oracle
from tests.engine.tiny_checkpoint import TinyModel, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE = 100.0  # generous: the machine may be busy; nothing waits for it when all is well
SLOW = "slow:0.01"  # seconds of a step
POLICY = SupervisionPolicy(first_backoff=0.01, max_backoff=0.02, stop_seconds=DEADLINE)


def make_engine(
    model: str = "toy",
    policy: SupervisionPolicy = POLICY,
    max_batch_tokens: int = 2048,
    **kwargs: Any,
) -> EngineProcess:
    config = EngineConfig(model=model, max_batch_tokens=max_batch_tokens)
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
    """The last update; of a request that was not read before, all updates merged."""
    await until(lambda: generation.finished)
    update = await generation.next_update()
    assert update is not None
    assert update.finish_reason is not None
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
            generations = border.submit_all([Job(p, greedy(10)) for p in prompts])
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
    assert engine._watch is not None
    child = engine._watch.child
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


@pytest.mark.parametrize("poison", [RAISE, KILL], ids=["F08 exception in a step", "kill -9"])
def test_f03_a_request_that_ends_every_engine_fails_alone_and_is_refused(poison: int) -> None:
    async def test() -> None:
        async with running(model=SLOW) as engine:
            first_pid = engine.pid
            before = [engine.submit([n, 7], greedy(60)) for n in range(3)]
            for generation in before:
                await generation.next_update()
            victim = engine.submit([4, poison], greedy(5))
            neighbour = engine.submit([9, 9], greedy(40))
            assert (await finish(victim)).finish_reason == "error"
            for n, generation in enumerate(before):
                await finish(generation)
                assert generation.output == toy_generate([n, 7], 60)
            await finish(neighbour)
            assert neighbour.output == toy_generate([9, 9], 40)
            assert engine.pid != first_pid
            assert engine.restarts == 4, "the first life and three resumes in vain"
            assert engine.recovery.poisoned == 1
            with pytest.raises(PoisonError):
                engine.submit([4, poison], greedy(5, seed=77))
            await finish(engine.submit([4, 5], greedy(5)))
            assert engine.restarts == 4

    run(test)


@pytest.mark.parametrize(("token", "off"), [(NO_GRAPHS, 1), (NO_KERNELS, 2)])
def test_f08_a_feature_that_fails_is_left_out_and_nothing_is_lost(token: int, off: int) -> None:
    async def test() -> None:
        async with running(model="broken kernels") as engine:
            generation, other = engine.submit([1, token], greedy(9)), engine.submit([5], greedy(9))
            assert (await finish(generation)).finish_reason == "length"
            await finish(other)
            assert other.output == toy_generate([5], 9)
            assert engine.recovery.poisoned == 0
            assert (engine.restarts, engine.recovery.features_off) == (1 + off, off)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: engine.restarts == 2 + off and engine.state == "ready")
            assert engine.recovery.features_off == 0, "tried again when nobody is suspected"

    run(test)


def test_f03_two_poisons_at_once_do_not_spend_the_budget() -> None:
    """Each costs four engines of the five that may be lost; one that is explained is given back."""

    async def test() -> None:
        async with running() as engine:
            victims = [engine.submit([n, KILL], greedy(5)) for n in range(2)]
            good = engine.submit([9, 9], greedy(40))
            for victim in victims:
                assert (await finish(victim)).finish_reason == "error"
            await finish(good)
            assert good.output == toy_generate([9, 9], 40)
            assert engine.recovery.poisoned == 2

    run(test)


def test_f01_killed_in_decode_every_stream_goes_on() -> None:
    """Greedy, seeded with log-probabilities, echo: all as in a run that nobody disturbed."""
    echo = SamplingParams(temperature=0.0, max_tokens=30, logprobs=1, prompt_logprobs=1)
    drawn = SamplingParams(seed=5, max_tokens=80, logprobs=2)
    requests = [([1], greedy(90)), ([2, 3], drawn), (list(range(40)), echo)]

    async def collect(kill: bool) -> list[RequestUpdate]:
        async with running(model=SLOW) as engine:
            generations = [engine.submit(prompt, params) for prompt, params in requests]
            await until(lambda: all(len(g.output) > 3 for g in generations))
            if kill:
                assert engine.pid is not None
                os.kill(engine.pid, signal.SIGKILL)
                await until(lambda: engine.state == "restarting")
                with pytest.raises(EngineUnavailableError, match="restarting"):
                    engine.submit([1], greedy(1))
            results = [await finish(generation) for generation in generations]
            assert engine.recovery.resumed == (3 if kill else 0)
            assert engine.recovery.outages == engine.restarts == int(kill)
            assert (engine.recovery.outage_seconds > 0) == kill
            assert engine.stats.generated_tokens >= 200, "totals never fall"
            return results

    async def test() -> None:
        whole, resumed = await collect(kill=False), await collect(kill=True)
        for want, got in zip(whole, resumed, strict=True):
            assert got.timing is not None
            assert want.timing is not None
            assert (got.timing.decode or 0.0) > (want.timing.decode or 0.0), "with the pause"
            assert msgspec.structs.replace(got, timing=want.timing) == want

    run(test)


def test_f02_killed_in_prefill_before_anything_was_told() -> None:
    async def test() -> None:
        async with running(model=SLOW) as engine:
            generation = engine.submit(list(range(80)), greedy(5))
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            await finish(generation)
            assert generation.output == toy_generate(list(range(80)), 5)
            assert engine.recovery.resumed == 1

    run(test)


def test_what_is_aborted_during_the_restart_is_not_resumed() -> None:
    async def test() -> None:
        async with running(model=SLOW) as engine:
            kept, dropped = engine.submit([1], greedy(50)), engine.submit([2], greedy(50))
            await dropped.next_update()
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: engine.state == "restarting")
            dropped.abort()
            await finish(kept)
            assert kept.output == toy_generate([1], 50)
            assert engine.recovery.resumed == 1

    run(test)


def test_f04_a_hang_ends_in_a_restart_and_streams_go_on() -> None:
    async def test() -> None:
        policy = SupervisionPolicy(silence_seconds=2.0, seconds_per_token=0.0)
        async with running(model=SLOW, policy=policy) as engine:
            pid = engine.pid
            assert pid is not None
            generation = engine.submit([1], greedy(60))
            await generation.next_update()
            os.kill(pid, signal.SIGSTOP)
            await finish(generation)
            assert generation.output == toy_generate([1], 60)
            assert engine.pid != pid
            assert not psutil.pid_exists(pid)

    run(test)


def test_f04_a_long_step_is_not_a_hang() -> None:
    """Silence is judged by the step that the engine noted, not by the clock alone."""

    async def test() -> None:
        policy = SupervisionPolicy(silence_seconds=0.6, seconds_per_token_cpu=DEADLINE)
        async with running(model="slow:2", policy=policy) as engine:
            generation = engine.submit([1, 2], greedy(1))
            await until(lambda: engine.step_seconds() > 0)
            await finish(generation)
            assert engine.restarts == 0
            await until(lambda: engine.step_seconds() == 0)

    run(test)


@pytest.mark.parametrize("step", [-86400.0, 86400.0], ids=["back", "forth"])
def test_f18_a_stepped_wall_clock_changes_nothing(
    step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with running(model=SLOW) as engine:
            generation = engine.submit([1], greedy(40))
            await generation.next_update()
            real = time.time
            monkeypatch.setattr(time, "time", lambda: real() + step)
            last = await finish(generation)
            assert engine.restarts == 0
            assert 0 <= engine.seconds_since_step() < DEADLINE
            assert last.timing is not None
            assert last.timing.decode is not None
            assert 0 < last.timing.decode < DEADLINE

    run(test)


def test_f18_no_deadline_or_duration_is_taken_from_the_wall_clock() -> None:
    """Wall time is for `created` and logs: nothing in the engine asks for it at all."""
    for path in sorted((ROOT / "engine").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                assert name not in ("time.time", "datetime.now", "datetime.utcnow"), path


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


def test_the_restart_budget_ends_in_dead_with_a_reason() -> None:
    async def test() -> None:
        policy = SupervisionPolicy(max_restarts=2, first_backoff=0.01, stop_seconds=DEADLINE)
        async with running(model=SLOW, policy=policy) as engine:
            generation = engine.submit([1], greedy(120))
            for lost in range(3):
                await until(lambda: engine.state == "ready")
                assert engine.restarts == lost
                await generation.next_update()
                assert engine.pid is not None
                os.kill(engine.pid, signal.SIGKILL)
                await until(lambda: engine.state != "ready")
            reason = await engine.wait_dead()
            assert "lost 3 times within 600 s" in reason
            assert "killed by signal 9" in reason
            with pytest.raises(EngineUnavailableError, match="dead"):
                await finish(generation)
            with pytest.raises(EngineUnavailableError, match="dead"):
                engine.submit([1], greedy(1))

    run(test)


@pytest.mark.parametrize(
    ("kind", "trouble"),
    [
        pytest.param("folder", "the model folder is not usable", id="F27 folder gone"),
        pytest.param("device", "the engine does not start", id="F06 device lost"),
    ],
)
def test_starts_that_fail_spend_no_budget_and_say_why(
    tmp_path: Path, kind: str, trouble: str
) -> None:
    """It stays in restarting, live requests wait, and all goes on when the cause is gone."""
    marker = tmp_path / "model"

    async def test() -> None:
        marker.touch()
        policy = SupervisionPolicy(max_restarts=1, first_backoff=0.01, max_backoff=0.02)
        async with running(model=f"once:{kind}:{marker}", policy=policy) as engine:
            generation = engine.submit([1], greedy(100))
            await generation.next_update()
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: engine.restarts >= 2 and engine.trouble is not None)
            assert engine.state == "restarting"
            assert engine.trouble == trouble
            marker.touch()
            await finish(generation)
            assert generation.output == toy_generate([1], 100)
            assert engine.trouble is None

    run(test)


def test_starts_that_fail_for_too_long_end_in_dead(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "model").touch()
        policy = SupervisionPolicy(start_seconds=0.01, first_backoff=0.01)
        async with running(model=f"once:folder:{tmp_path / 'model'}", policy=policy) as engine:
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            assert "model: there is no config.json" in await engine.wait_dead()

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


BAD_FRAMES: dict[str, list[bytes]] = {
    "another version": [b"RTPB\x63\x00\x00\x00", b"\xc0"],
    "truncated": encode(Report(updates=[], stats=Stats()))[:1],
    "cut body": [encode(Shutdown())[0], encode(Shutdown())[1][:-3]],
    "oversize": [encode(Shutdown())[0], bytes(MAX_MESSAGE_BYTES)],
}


@pytest.mark.parametrize("side", [requests_path, reports_path], ids=["to engine", "from engine"])
def test_f24_bad_frames_are_treated_as_a_crash_and_nothing_is_lost(
    side: Callable[[str], str],
) -> None:
    async def test() -> None:
        async with running(model=SLOW) as engine:
            generation = engine.submit([1], greedy(100))
            for restarts, frames in enumerate(BAD_FRAMES.values(), 1):
                await until(lambda: engine.state == "ready")
                length = len(generation.output)
                await until(lambda: len(generation.output) > length)  # noqa: B023
                context = zmq.Context()
                with context.socket(zmq.PUSH) as sender:
                    sender.connect(f"ipc://{side(channel_folder(engine))}")
                    sender.send_multipart(frames)
                    await until(lambda: engine.restarts == restarts)  # noqa: B023
                context.term()
            await finish(generation)
            assert generation.output == toy_generate([1], 100)

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


def test_a_call_is_admitted_whole_or_not_at_all_and_its_prompt_charged_once() -> None:
    async def test() -> None:
        limits = {"max_queued_requests": 6, "max_queued_prefill_tokens": 100}
        async with running(max_batch_tokens=32, **limits) as engine:
            first = engine.submit([1] * 40, greedy(60))
            with pytest.raises(QueueFullError) as caught:
                engine.submit_all([Job([n] * 61, greedy(1)) for n in range(2)])
            assert caught.value.reason == "prefill_backlog"
            with pytest.raises(QueueFullError), engine.hold(1, 61):
                pytest.fail("it was let in")
            prompt = [2] * 48
            same = engine.submit_all([Job(prompt, greedy(3))] * 4)  # 48, and 4 more each
            with pytest.raises(QueueFullError) as caught:
                engine.submit_all([Job(prompt, greedy(1))] * 2)
            assert caught.value.reason == "queue_full"
            with pytest.raises(RequestError):
                engine.submit_all([Job([3], greedy(1)), Job([2**31], greedy(1))])
            for generation in same:
                assert (await finish(generation)).finish_reason == "length"
            first.abort()
            await until(lambda: engine.stats.running + engine.stats.waiting == 0)
            assert engine.stats.generated_tokens < 60 + 12 + 1, "of the refused ones nothing ran"
            await finish(engine.submit_all([Job([4] * 99, greedy(1))])[0])

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
        assert time.monotonic() - killed < 2


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
