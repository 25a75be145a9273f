"""Lines to a file descriptor without ever waiting for whoever reads it.

A pipe whose reader has stopped takes no more after 64 KiB, and the next write waits for ever. So a
thread of its own writes, from a queue with an end; lines that find no place are counted, not kept.
"""

from __future__ import annotations

import os
import queue
import select
import threading
import time

MAX_LINES = 4096  # that wait to be written
MAX_LINE_BYTES = 16 * 1024  # a longer line is cut: 64 MiB wait at most


class LineWriter:
    """Writes from its thread until `close`. Safe to use from several threads."""

    def __init__(self, fd: int, max_lines: int = MAX_LINES) -> None:
        """`fd` stays open, and stays the caller's."""
        self._fd = fd
        self._lines: queue.Queue[bytes | None] = queue.Queue(max_lines)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines that were lost: there was no place for them, or nobody could read them."""
        return self._dropped

    def write(self, line: str) -> None:
        """Queue a line, given without its end; never waits."""
        encoded = line.encode(errors="replace")[:MAX_LINE_BYTES] + b"\n"
        try:
            self._lines.put_nowait(encoded)
        except queue.Full:
            self._dropped += 1

    def close(self, seconds: float) -> None:
        """Write what waits, for `seconds` at most; then what is left is lost."""
        deadline = time.monotonic() + seconds
        try:
            self._lines.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(max(deadline - time.monotonic(), 0))

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write_whole(line)
            except OSError:  # the reader has gone
                self._dropped += 1

    def _write_whole(self, line: bytes) -> None:
        while line:
            try:
                line = line[os.write(self._fd, line) :]
            except BlockingIOError:  # someone who shares the pipe has made it non-blocking
                select.select([], [self._fd], [])
