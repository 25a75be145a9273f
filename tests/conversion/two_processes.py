"""Work that two processes on gloo do together."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

WORLD = 2
TIMEOUT = timedelta(seconds=60)
# They are forked from a process that has imported what all of them need, most of it torch.
PRELOADED = ["conversion.embedded.trainer", "tests.conversion.tiny_distillation"]


def in_two_processes(work: Callable[..., None], folder: Path, *args: Any) -> None:
    """Call `work(rank, folder, *args)` in both; `folder` must be new to every pair.

    Raises:
        Exception: one of them failed; the message has its traceback.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    start: Any = start_processes
    start(_take_part, (work, folder, *args), WORLD, start_method="forkserver")


def _take_part(rank: int, work: Callable[..., None], folder: Path, *args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", timeout=TIMEOUT, world_size=WORLD, rank=rank
    )
    work(rank, folder, *args)
    # End without the interpreter's and the C library's own shutdown: `destroy_process_group` does
    # not end a group whose mesh is still known, and torch's cache of redistributions (DTensor)
    # knows it for ever. gloo's threads go on while the libraries that they use take themselves
    # apart, and rarely (twice in some 45 runs) a process died of a signal there. All that is
    # tested came before: a crash or a failure there still fails the test.
    dist.destroy_process_group()
    os._exit(0)
