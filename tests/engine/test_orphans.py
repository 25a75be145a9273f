"""Engines without a front end: one that has lost it, and one that never had any."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from tests.engine.process_bench import (
    DEADLINE,
    ROOT,
)

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


def seconds_until_orphan_is_gone() -> float:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.ppid() == parent.pid
        killed = time.monotonic()
        parent.kill()
        child.wait(timeout=DEADLINE)
        return time.monotonic() - killed


def test_f23_a_killed_front_end_leaves_no_engine_behind() -> None:
    """Within two seconds; a machine that is busy with other things gets further tries."""
    assert any(seconds_until_orphan_is_gone() < 2 for _ in range(4))


def test_an_engine_without_a_front_end_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "engine.child_main"], input=b"", cwd=ROOT, check=False
    )
    assert done.returncode == 2
    assert "started by the front end" in capfd.readouterr().err
