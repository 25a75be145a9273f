"""Log lines: what stands in them, and that nobody ever waits for whoever reads them."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import pytest

from engine.line_writer import MAX_LINE_BYTES, LineWriter
from engine.log_lines import log_lines

logger = logging.getLogger("tests.lines")


@pytest.fixture
def pipe() -> Iterator[tuple[BinaryIO, int]]:
    """A reader's end and the descriptor to write to; it holds one page."""
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    with os.fdopen(read_fd, "rb") as reader:
        yield reader, write_fd
    os.close(write_fd)


def json_lines(reader: BinaryIO, count: int) -> list[dict[str, Any]]:
    return [json.loads(reader.readline()) for _ in range(count)]


def test_a_json_line_has_the_fixed_fields_and_its_own(pipe: tuple[BinaryIO, int]) -> None:
    reader, fd = pipe
    with log_lines("json", "engine", fd):
        logger.info("request %d ended", 7, extra={"fields": {"tokens": 3, "share": 0.5}})
        logger.debug("not shown")
        logger.warning('odd "text"\nof two lines')
    first, second = json_lines(reader, 2)
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "process": "engine",
        "logger": "tests.lines",
        "message": "request 7 ended",
        "tokens": 3,
        "share": 0.5,
    }
    assert (second["level"], second["message"]) == ("warning", 'odd "text"\nof two lines')


def test_tracebacks_and_warnings_are_lines_too(pipe: tuple[BinaryIO, int]) -> None:
    reader, fd = pipe
    with log_lines("json", "front end", fd), warnings.catch_warnings():
        warnings.simplefilter("always")
        try:
            raise ValueError("broken")
        except ValueError:
            logger.exception("it failed")
        warnings.warn("beware", stacklevel=1)
    failed, warned = json_lines(reader, 2)
    assert failed["traceback"].endswith("ValueError: broken")
    assert "beware" in warned["message"]


def test_a_line_of_text_shows_the_fields_that_say_something(pipe: tuple[BinaryIO, int]) -> None:
    reader, fd = pipe
    with log_lines("text", "front end", fd):
        logger.info("GET / 200", extra={"fields": {"seconds": 0.123456, "code": None, "n": 2}})
    assert reader.readline().decode().endswith(" INFO tests.lines: GET / 200 seconds=0.1235 n=2\n")


def test_F12_a_stopped_reader_costs_lines_and_no_time(pipe: tuple[BinaryIO, int]) -> None:
    """Everything that had a place is there, in order, once the reader goes on."""
    reader, fd = pipe
    writer = LineWriter(fd, max_lines=20)
    for number in range(500):
        writer.write(f"{number:04} " + "x" * 200)
    written = 500 - writer.dropped
    assert 20 <= written < 60, "a page of pipe, the queue, and the line in between"
    begun = time.monotonic()
    writer.close(0.05)
    assert time.monotonic() - begun < 5, "the end does not wait for the reader either"
    numbers = [int(reader.readline()[:4]) for _ in range(written)]
    assert numbers == sorted(numbers)
    assert numbers[:20] == list(range(20))


def test_F12_the_end_writes_what_waits(pipe: tuple[BinaryIO, int]) -> None:
    reader, fd = pipe
    writer = LineWriter(fd, max_lines=500)
    for number in range(400):
        writer.write(f"{number:04} " + "x" * 200)
    closing = threading.Thread(target=writer.close, args=(30,))
    closing.start()
    assert [int(reader.readline()[:4]) for _ in range(400)] == list(range(400))
    closing.join(30)
    assert writer.dropped == 0


def test_a_reader_that_has_gone_is_counted() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    writer = LineWriter(write_fd)
    writer.write("nobody reads this")
    writer.close(10)
    os.close(write_fd)
    assert writer.dropped == 1


def test_a_pipe_that_somebody_made_non_blocking_loses_nothing(pipe: tuple[BinaryIO, int]) -> None:
    reader, fd = pipe
    os.set_blocking(fd, False)
    writer = LineWriter(fd)
    writer.write("x" * (2 * MAX_LINE_BYTES))  # cut, and still several times the pipe
    assert len(reader.readline()) == MAX_LINE_BYTES + 1
    writer.close(10)
    assert writer.dropped == 0
