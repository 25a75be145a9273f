"""A command keeps to its time, and what it has started never outlasts it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.bounded_process import end_family, run_bounded

# A child that starts its own in a session of its own, and names it.
STARTS_ANOTHER = """
import subprocess, sys, time
sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(sleeps, start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def runs(pid: int) -> bool:
    """Neither gone nor waiting for somebody to read its exit code."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_in_another_session_ends_with_its_family() -> None:
    """As compilers do, to each of which ninja gives a group of its own."""
    command = [sys.executable, "-c", STARTS_ANOTHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        below = int(child.stdout.readline())
        assert runs(below)
        end_family(child.pid)
        assert child.wait() == -9
    wait_until_gone(below)


def test_a_command_is_told_by_how_it_ended() -> None:
    code = "import os, sys; print(os.environ['ADDED']); print('{\"a\": 1}\\n\\n{', file=sys.stderr)"
    ended = run_bounded([sys.executable, "-c", code + "; sys.exit(3)"], 60, {"ADDED": "here"})
    assert (ended.status, ended.stopped) == (3, False)
    assert sorted(ended.lines) == ["here", "{", '{"a": 1}']
    assert ended.last_json == {"a": 1}
    stopped = run_bounded([sys.executable, "-c", "import time; time.sleep(600)"], 0.2)
    assert (stopped.status, stopped.stopped) == (-9, True)
    assert stopped.last_json is None
    assert 0.2 <= stopped.seconds < 60


def test_an_interrupted_wait_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen[str]):
        def communicate(self, *args: object, **kwargs: object) -> tuple[str, str]:
            started.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_bounded([sys.executable, "-c", "import time; time.sleep(600)"], 60)
    assert started[0].returncode == -9
