"""FlashInfer tried in a process of its own first: there it may compile for minutes, or hang.

What is measured here can do without it, so it gets some seconds, and is left out if it takes more.
What it has compiled by then stays: the next trial goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.bounded_process import run_bounded
from benchmarks.peer_check import PeerError

COMMAND = (sys.executable, "-m", "benchmarks.flashinfer_peer")


def try_peer(seconds: float, command: Sequence[str] = COMMAND) -> float:
    """Build and check FlashInfer; the seconds that it took, of those that it may take.

    Raises:
        PeerError: it was not ready in time, is not installed, or failed; the message says which.
    """
    ended = run_bounded(command, seconds)
    if ended.stopped:
        ahead = " ".join(("python", *COMMAND[1:]))
        raise PeerError(f"not ready within {seconds:g} s; `{ahead}` makes it so")
    if ended.status != 0:
        last = ended.lines[-1].strip() if ended.lines else "no output"
        raise PeerError(f"{last.removeprefix('flashinfer: ')[:400]} (status {ended.status})")
    if reason := (ended.last_json or {}).get("not_measured"):
        raise PeerError(reason)
    return ended.seconds
