"""`rtpurbo inspect`: head map, cost of a token, memory plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from server.commands.failure import fail
from server.commands.options import JsonOption, ModelArgument


def inspect(
    model: ModelArgument = None,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the head map (needs matplotlib).")
    ] = None,
    gpu_gib: Annotated[
        float, typer.Option(min=0.1, help="Plan the memory of a GPU of this size.")
    ] = 80,
    index_dtype: Annotated[
        Literal["auto", "int8"], typer.Option(help="Of index keys; auto: bfloat16.")
    ] = "auto",
) -> None:
    """Show a model folder's head map, what a token of context costs, and a memory plan."""
    from engine.embedded import embedded_model_path
    from engine.errors import EngineError
    from server.model_report import model_report, plot_head_map, render_report

    folder = model or embedded_model_path()
    try:
        size = int(gpu_gib * 2**30)
        given = (folder, size, index_dtype)
        print(json.dumps(model_report(*given)) if as_json else render_report(*given))
        if plot is not None:
            plot_head_map(folder, plot)
    except EngineError as error:
        fail(error)
    except ImportError:
        fail("--plot needs matplotlib: pip install 'rtpurbo[plot]'")
