"""A command in a process of its own, for so many seconds at most; with it ends all that it started.

A process group does not reach all: ninja gives every compiler a group, so that killing ninja's
leaves compilers at work beside whatever is timed next. Parents do (Linux, /proc).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a command.

    status: its exit code; negative: the signal that ended it. stopped: its time was up.
    seconds: what it took. output: standard output and standard error, as they came.
    """

    status: int
    stopped: bool
    seconds: float
    output: str

    @property
    def lines(self) -> list[str]:
        """Of the output, those that say something."""
        return [line for line in self.output.splitlines() if line.strip()]

    @property
    def last_json(self) -> Any:
        """The object of the last line that is one; None without such a line."""
        for line in reversed(self.lines):
            if line.startswith("{"):
                try:
                    return json.loads(line)
                except ValueError:
                    continue
        return None


def run_bounded(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run to the end or for `seconds`; also an exception here, such as Ctrl-C, leaves nothing.

    A command that is not there ends with status 127, as in a shell.

    Args:
        environment: beyond that of this process.
    """
    if shutil.which(command[0]) is None:
        return Ended(127, False, 0.0, f"{command[0]}: not found")
    start, stopped = time.monotonic(), False
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **(environment or {})},
        start_new_session=True,  # Ctrl-C comes here alone, and ends it from here
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            stopped = True
            end_family(process.pid)
            output, _ = process.communicate()
        except BaseException:
            end_family(process.pid)
            raise
    return Ended(process.returncode, stopped, time.monotonic() - start, output)


def end_family(root: int) -> None:
    """Kill a process and all below it, whatever their groups and sessions.

    They are halted first, so that none starts another or loses its parent while they are counted.
    """
    halted: set[int] = set()
    while found := _family(root) - halted:
        for pid in found:
            _send(pid, signal.SIGSTOP)
        halted |= found
    for pid in halted:
        _send(pid, signal.SIGKILL)


def _family(root: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parent = stat.read_bytes().rpartition(b")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, unseen = {root}, [root]
    while unseen:
        below = children.get(unseen.pop(), [])
        found.update(below)
        unseen += below
    return found


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
