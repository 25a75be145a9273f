"""One bar with the time left, for steps that take a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]  # see `advance` below


@contextmanager
def progress_bar(
    console: Console, name: str, total: int, done: int = 0, *, transient: bool = False
) -> Iterator[Advance]:
    """A bar on `console`; call what is yielded once for each of `total` pieces.

    Args:
        total: may be a guess: at the end, the pieces that there were are all.
        done: pieces that an earlier run has done.
        transient: the bar goes when it ends, and only terminals show it.
    """
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    hidden = transient and not console.is_terminal
    with Progress(*columns, console=console, transient=transient, disable=hidden) as progress:
        task = progress.add_task("", total=total, completed=done)

        def advance(news: str = "", pieces: int = 1) -> None:
            """`pieces` more are done; `news` is a word to show beside the bar."""
            progress.update(task, advance=pieces, description=news)

        yield advance
        progress.update(task, total=progress.tasks[0].completed)
