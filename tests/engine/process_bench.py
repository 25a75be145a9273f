"""Real engine processes around the toy model, and how tests wait for what they do."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from engine.child import EngineChild
from engine.client import Generation, Job
from engine.config import EngineConfig
from engine.messages import RequestUpdate
from engine.process import EngineProcess
from engine.request import SamplingParams
from engine.supervision import SupervisionPolicy
from tests.engine.fake_engine import launch_toy

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


def submit(engine: EngineProcess, prompt: Sequence[int], params: SamplingParams) -> Generation:
    """A call of one request."""
    return engine.submit_all([Job(prompt, params)])[0]


async def finish(generation: Generation) -> RequestUpdate:
    """The last update; of a request that was not read before, all updates merged."""
    await until(lambda: generation.finished)
    update = await generation.next_update()
    assert update is not None
    assert update.finish_reason is not None
    return update


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)


def channel_folder(engine: EngineProcess) -> str:
    watch = engine._child._watch
    assert watch is not None
    child = watch.child
    assert isinstance(child, EngineChild)
    return child._channel.folder


def kill(engine: EngineProcess) -> None:
    """End the engine process as `kill -9` does."""
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
