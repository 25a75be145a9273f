"""What all processes of a run need and one of them makes."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first process to ask fills, while others wait; not to be changed.

    A process that fails to leaves it to the next one, from the start.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers
    folder, done = root / name, root / f"{name}.made"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@contextmanager
def bytecode_first(file: Path) -> Iterator[None]:
    """On a fresh checkout the first process imports alone, and so compiles for all of them.

    Args:
        file: of the checkout; locked, not changed.
    """
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    is_there = Path(cache_from_source(torch.origin)).exists() or sys.dont_write_bytecode
    with file.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another is the first
            fcntl.flock(lock, fcntl.LOCK_SH)
        else:
            if is_there:
                fcntl.flock(lock, fcntl.LOCK_UN)
        yield
