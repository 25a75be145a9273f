"""Log lines of both processes: one JSON object each for machines, or one line of text for people.

    {"time":"2026-11-25T22:33:10.123Z","level":"info","process":"engine","logger":"engine.core",
     "message":"...", ...}

Further fields come with `extra={"fields": {...}}`. Prompts and outputs are never among them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from engine.line_writer import MAX_LINES, LineWriter

LogFormat = Literal["json", "text"]

STDOUT = 1
FLUSH_SECONDS = 2.0  # at the end of a process
_MAX_TRACEBACK = 8000  # characters; the end tells most


@contextmanager
def log_lines(
    kind: LogFormat, process: str, fd: int = STDOUT, max_lines: int = MAX_LINES
) -> Iterator[LineWriter]:
    """Send every logger's lines, and warnings, to `fd` until the block ends.

    Args:
        process: which of ours speaks; both write to the same place.
        max_lines: that may wait for their reader; further ones are dropped and counted.
    """
    writer = LineWriter(fd, max_lines)
    handler = LineHandler(writer)
    handler.setFormatter(JsonFormatter(process) if kind == "json" else TextFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield writer
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
        root.removeHandler(handler)
        writer.close(FLUSH_SECONDS)


def default_format(fd: int = STDOUT) -> LogFormat:
    """Text where people read along, else JSON."""
    return "text" if os.isatty(fd) else "json"


class LineHandler(logging.Handler):
    """Formats where the line comes from, writes elsewhere."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write(self.format(record))
        except Exception:  # as the standard handlers do: logging never ends a request
            self.handleError(record)


class JsonFormatter(logging.Formatter):
    """One object a line, with the fixed fields first."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)[-_MAX_TRACEBACK:]
        return msgspec.json.encode(line).decode()


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, and the fields that say something."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(
            f" {name}={_shown(value)}"
            for name, value in _fields(record).items()
            if value is not None
        )
        line = f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)[-_MAX_TRACEBACK:]
        return line


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _time(record: logging.LogRecord) -> str:
    """UTC, to the millisecond."""
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
