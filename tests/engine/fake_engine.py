"""An engine process with the toy model: `EngineProcess(config, launch=launch_toy)`.

`config.model` chooses what happens at start; see `build`. The loop, the scheduler, the wire and
the supervision are the real ones.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from engine.batch import Batch
from engine.child import EngineChild
from engine.child_main import run_engine
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.messages import EngineInfo
from engine.request import Request
from engine.step import EngineParts, PendingStep
from tests.engine.fake_runner import NO_GRAPHS, NO_KERNELS, FakeRunner
from tests.engine.toy_info import toy_info, toy_scheduler

TOY_FILE = "toy.json"
HELD_TOKENS = 6  # of each request that is to be in the middle of its answer


async def launch_toy(config: EngineConfig) -> EngineChild:
    """Start this module as the child."""
    return await EngineChild.launch(config, "tests.engine.fake_engine")


def build(config: EngineConfig) -> EngineParts:
    if config.model == "no-folder":
        raise CheckpointError("no-folder: there is no config.json")
    if config.model == "too-small":
        raise ConfigError("kv_cache_bytes must be at least 1000, got 1")
    if config.model == "crash-at-load":
        os._exit(7)
    if config.model == "bug-at-load":
        raise ZeroDivisionError("nobody expected this")
    if config.model == "hang-at-load":
        time.sleep(3600)
    step_seconds = 0.0
    settings = Path(config.model) / TOY_FILE  # of a folder that a whole server can serve
    if settings.exists():
        given = json.loads(settings.read_text())
        step_seconds = given["step_seconds"]
        time.sleep(given["load_seconds"])
    if config.model.startswith("slow:"):  # seconds of each step
        step_seconds = float(config.model.removeprefix("slow:"))
    if config.model.startswith("once:"):  # loads whenever the file is there, and removes it
        _, kind, path = config.model.split(":", 2)
        marker, step_seconds = Path(path), 0.025
        if not marker.exists() and kind == "folder":
            raise CheckpointError(f"{marker.name}: there is no config.json")
        if not marker.exists():
            raise RuntimeError("CUDA error: no device")
        marker.unlink()
    if config.model.startswith("held:"):
        _, requests, path = config.model.split(":", 2)
        info = toy_info()
        return EngineParts(toy_scheduler(info), HeldRunner(info, int(requests), Path(path)))
    info, broken = toy_info(), []
    if config.model == "broken kernels":  # as if it ran on a GPU whose fast paths have faults
        info = msgspec.structs.replace(info, device="cuda:0")
        broken = [NO_GRAPHS] * config.cuda_graphs + [NO_KERNELS] * (config.kernels != "torch")
    runner = FakeRunner(info, step_seconds, broken, overlaps=True)
    return EngineParts(toy_scheduler(info), runner)


class HeldRunner(FakeRunner):
    """Starts no step while a file is there and so many requests are in the middle of their answers.

    A test acts at that point, however long it takes to get there, and removes the file.
    """

    def __init__(self, info: EngineInfo, requests: int, file: Path) -> None:
        super().__init__(info, overlaps=True)
        self._requests = requests
        self._file = file

    def start(self, batch: Batch, requests: Mapping[int, Request]) -> PendingStep:
        begun = sum(len(request.output) >= HELD_TOKENS for request in requests.values())
        while begun >= self._requests and self._file.exists():
            time.sleep(0.005)
        return super().start(batch, requests)


if __name__ == "__main__":
    sys.exit(run_engine(build))
