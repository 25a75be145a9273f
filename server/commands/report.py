"""`rtpurbo report`: the folder of pictures and numbers of a converted model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.commands.failure import fail


def report(
    out: Annotated[Path, typer.Argument(help="Converted model folder.")],
    evaluations: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="File of `eval --json`, instead of earlier ones; again: more."),
    ] = None,
    ablations: Annotated[Path | None, typer.Option(help="File that `ablate` wrote.")] = None,
) -> None:
    """Make OUT/report again: head map, indexer, training, and what evaluations have found.

    What is not given anew is kept from the report that is there.
    """
    from rich.console import Console

    from conversion.report.report_folder import make_report
    from engine.errors import EngineError

    console = Console(stderr=True)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    try:
        print(make_report(out, tell, evaluations=evaluations or (), ablations=ablations))
    except EngineError as error:
        fail(error)
