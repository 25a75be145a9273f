"""One bar with the time left, for steps that take a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]  # with a word to show beside the bar, if there is news


@contextmanager
def progress_bar(console: Console, name: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar on `console`; call what is yielded once for each of `total` pieces.

    Args:
        done: pieces that an earlier run has done.
    """
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, completed=done)

        def advance(news: str = "") -> None:
            progress.update(task, advance=1, description=news)

        yield advance
        progress.update(task, completed=total)  # where the total was a guess
