"""Engine processes that die, hang or speak nonsense; requests go on."""

from __future__ import annotations

import ast
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq

from engine.errors import (
    EngineUnavailableError,
)
from engine.ipc import MAX_MESSAGE_BYTES, encode, reports_path, requests_path
from engine.messages import Report, RequestUpdate, Shutdown, Stats
from engine.request import SamplingParams
from engine.supervision import SupervisionPolicy
from tests.engine.fake_runner import (
    toy_generate,
)
from tests.engine.process_bench import (
    DEADLINE,
    ROOT,
    SLOW,
    channel_folder,
    finish,
    greedy,
    kill,
    run,
    running,
    submit,
    until,
)


@dataclass(frozen=True, slots=True)
class Hold:
    """While its file is there, engines wait in the middle of so many answers."""

    file: Path

    def model(self, requests: int) -> str:
        return f"held:{requests}:{self.file}"

    def release(self) -> None:
        self.file.unlink()


@pytest.fixture
def hold(tmp_path: Path) -> Hold:
    (tmp_path / "held").touch()
    return Hold(tmp_path / "held")


def test_f01_killed_in_decode_every_stream_goes_on(hold: Hold) -> None:
    """Greedy, seeded with log-probabilities, echo: all as in a run that nobody disturbed."""
    echo = SamplingParams(temperature=0.0, max_tokens=30, logprobs=1, prompt_logprobs=1)
    drawn = SamplingParams(seed=5, max_tokens=80, logprobs=2)
    requests = [([1], greedy(90)), ([2, 3], drawn), (list(range(40)), echo)]

    async def collect(disturb: bool) -> list[RequestUpdate]:
        async with running(model=hold.model(3) if disturb else "toy") as engine:
            generations = [submit(engine, prompt, params) for prompt, params in requests]
            await until(lambda: all(len(g.output) > 3 for g in generations))
            if disturb:
                kill(engine)
                hold.release()
                await until(lambda: engine.state == "restarting")
                with pytest.raises(EngineUnavailableError, match="restarting"):
                    submit(engine, [1], greedy(1))
            results = [await finish(generation) for generation in generations]
            assert engine.recovery.resumed == (3 if disturb else 0)
            assert engine.recovery.outages == engine.restarts == int(disturb)
            assert (engine.recovery.outage_seconds > 0) == disturb
            assert engine.stats.generated_tokens >= 200, "totals never fall"
            return results

    async def test() -> None:
        whole, resumed = await collect(disturb=False), await collect(disturb=True)
        for want, got in zip(whole, resumed, strict=True):
            assert got.timing is not None
            assert want.timing is not None
            assert (got.timing.decode or 0.0) > (want.timing.decode or 0.0), "with the pause"
            assert msgspec.structs.replace(got, timing=want.timing) == want

    run(test)


def test_f02_killed_in_prefill_before_anything_was_told(hold: Hold) -> None:
    async def test() -> None:
        async with running(model=hold.model(0)) as engine:
            generation = submit(engine, list(range(80)), greedy(5))
            kill(engine)
            hold.release()
            await finish(generation)
            assert generation.output == toy_generate(list(range(80)), 5)
            assert engine.recovery.resumed == 1

    run(test)


def test_what_is_aborted_during_the_restart_is_not_resumed(hold: Hold) -> None:
    async def test() -> None:
        async with running(model=hold.model(2)) as engine:
            kept, dropped = submit(engine, [1], greedy(50)), submit(engine, [2], greedy(50))
            await dropped.next_update()
            kill(engine)
            hold.release()
            await until(lambda: engine.state == "restarting")
            dropped.abort()
            await finish(kept)
            assert kept.output == toy_generate([1], 50)
            assert engine.recovery.resumed == 1

    run(test)


def test_f04_a_hang_ends_in_a_restart_and_streams_go_on(hold: Hold) -> None:
    async def test() -> None:
        policy = SupervisionPolicy(silence_seconds=2.0, seconds_per_token=0.0)
        async with running(model=hold.model(1), policy=policy) as engine:
            pid = engine.pid
            assert pid is not None
            generation = submit(engine, [1], greedy(60))
            await generation.next_update()
            os.kill(pid, signal.SIGSTOP)
            hold.release()
            await finish(generation)
            assert generation.output == toy_generate([1], 60)
            assert engine.pid != pid
            assert not psutil.pid_exists(pid)

    run(test)


def test_f04_a_long_step_is_not_a_hang() -> None:
    """Silence is judged by the step that the engine noted, not by the clock alone."""

    async def test() -> None:
        policy = SupervisionPolicy(silence_seconds=2.0, seconds_per_token_cpu=DEADLINE)
        async with running(model="slow:3", policy=policy) as engine:
            generation = submit(engine, [1, 2], greedy(1))
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
            generation = submit(engine, [1], greedy(40))
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
        async with running(model="slow:0.04") as engine:  # tokens for all of it, on a busy machine
            generation = submit(engine, [1], greedy(100))
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
