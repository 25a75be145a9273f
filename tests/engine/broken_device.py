"""A real engine whose device fails once, in its third step of decode tokens alone: fault F06.

A file says that it is to fail; it is unlinked before, so the next engine process is well. On CUDA
the fault is an assertion of the device, after which no call of the process succeeds; on the CPU it
is an exception.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from engine.batch import Batch
from engine.child import EngineChild
from engine.child_main import build_engine, run_engine
from engine.client import Generation
from engine.config import EngineConfig
from engine.messages import EngineInfo
from engine.process import EngineProcess
from engine.request import Request, SamplingParams
from engine.step import EngineParts, PendingStep, Runner
from tests.engine.process_bench import POLICY, finish, submit

FAULTY_STEP = 3
MARKER = "DEVICE_FAULT_MARKER"  # variable with the path of the file
Job = tuple[list[int], SamplingParams]


class BreakingRunner:
    """Implements `engine.step.Runner` with a real one."""

    def __init__(self, runner: Runner, marker: Path) -> None:
        self._runner = runner
        self._marker = marker
        self._decode_steps = 0

    @property
    def info(self) -> EngineInfo:
        return self._runner.info

    @property
    def overlaps(self) -> bool:
        return self._runner.overlaps

    def start(self, batch: Batch, requests: Mapping[int, Request]) -> PendingStep:
        self._decode_steps += all(span.rule == "decode" for span in batch.spans)
        if self._decode_steps == FAULTY_STEP and self._marker.exists():
            self._marker.unlink()
            values = torch.zeros(4, device=self.info.device)
            values[torch.tensor([2**20], device=self.info.device)] += 1
        return self._runner.start(batch, requests)

    def forget(self, request_id: int) -> None:
        self._runner.forget(request_id)


async def launch_breaking(config: EngineConfig) -> EngineChild:
    """Start this module as the child."""
    return await EngineChild.launch(config, "tests.engine.broken_device")


async def generate_through_a_fault(
    config: EngineConfig, jobs: list[Job], marker: Path
) -> tuple[list[Generation], EngineProcess]:
    """The jobs together, the device failing when all of them decode; what came of them.

    Args:
        marker: a file that is there, and will not be.
    """
    os.environ[MARKER] = str(marker)
    engine = EngineProcess(config, policy=POLICY, launch=launch_breaking)
    try:
        await engine.start()
        generations = [submit(engine, prompt, params) for prompt, params in jobs]
        await asyncio.gather(*map(finish, generations))
    finally:
        del os.environ[MARKER]
        await engine.stop()
    return generations, engine


def build(config: EngineConfig) -> EngineParts:
    parts = build_engine(config)
    return EngineParts(parts.scheduler, BreakingRunner(parts.runner, Path(os.environ[MARKER])))


if __name__ == "__main__":
    sys.exit(run_engine(build))
