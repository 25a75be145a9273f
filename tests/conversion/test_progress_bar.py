"""The one bar: it counts, ends full, and leaves nothing behind where it is not wanted."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from conversion.progress_bar import progress_bar


def shown(*, terminal: bool, transient: bool = False, advances: int = 3, done: int = 0) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    with progress_bar(console, "measure", 5, done, transient=transient) as advance:
        for number in range(advances):
            advance(f"KL {number}")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(("advances", "count"), [(3, "3/3"), (5, "5/5"), (7, "7/7")])
def test_a_total_that_was_a_guess_ends_as_what_there_was(advances: int, count: str) -> None:
    text = shown(terminal=False, advances=advances)
    assert "measure" in text
    assert count in text
    assert f"KL {advances - 1}" in text


def test_what_an_earlier_run_has_done_counts() -> None:
    assert "5/5" in shown(terminal=False, advances=3, done=2)


def test_several_pieces_at_once() -> None:
    console = Console(file=io.StringIO(), width=100)
    with progress_bar(console, "teacher", 12) as advance:
        advance(pieces=8)
        advance(pieces=4)
    assert isinstance(console.file, io.StringIO)
    assert "12/12" in console.file.getvalue()


def test_a_transient_bar_is_for_terminals_alone() -> None:
    assert "measure" in shown(terminal=True, transient=True)
    assert shown(terminal=False, transient=True) == ""
