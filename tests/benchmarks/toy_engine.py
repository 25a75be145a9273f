"""An engine process with the simulation's toy model, as slow as a small real one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import msgspec

from engine.batch import Batch
from engine.child_main import run_engine
from engine.config import EngineConfig
from engine.step import EngineParts
from tests.engine.toy_info import toy_info, toy_scheduler
from tests.simulation.toy_model import SimulatedRunner

STEP_SECONDS, TOKEN_SECONDS = 0.004, 0.00002


def build(config: EngineConfig) -> EngineParts:
    """Pools for a few requests, so that some of them are preempted."""
    info = msgspec.structs.replace(
        toy_info(full_pages=250, window_pages=60, max_num_seqs=6), max_model_len=700
    )

    def work(batch: Batch) -> Callable[[], None]:
        return lambda: time.sleep(STEP_SECONDS + TOKEN_SECONDS * batch.num_tokens)

    runner = SimulatedRunner(info, work)
    return EngineParts(toy_scheduler(info, max_batch_tokens=32), runner)


if __name__ == "__main__":
    sys.exit(run_engine(build))
