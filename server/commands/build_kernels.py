"""`rtpurbo build-kernels`: compile ahead of time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from server.commands.failure import fail
from server.commands.options import JsonOption, names


def build_kernels(
    kernel_cache: Annotated[
        Path | None,
        typer.Option(help="Folder of compiled kernels; default: ~/.cache/rtpurbo/kernels."),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Compute capabilities such as 80,90,120, or all; default: of the GPU at hand."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compile the CUDA kernels ahead of time, for this host's GPU or for an image without nvcc."""
    from rich.console import Console

    from kernels._build import TARGETS, KernelBuildError, default_cache, find_library

    chosen = TARGETS if targets == "all" else names(targets or "")
    try:
        with Console(stderr=True).status("Compiling CUDA kernels, up to a minute per target"):
            library = find_library(kernel_cache or default_cache(), chosen)
    except KernelBuildError as error:
        fail(error)
    print(json.dumps({"library": str(library)}) if as_json else library)
