"""Arguments that several commands share, and values that are lists in one word."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from server.commands.failure import misused

ModelArgument = Annotated[
    Path | None,
    typer.Argument(help="Model folder; without it the embedded model.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

# What eval and ablate measure by.
LengthsOption = Annotated[str, typer.Option(help="Tokens of prompt and answer, comma separated.")]
SamplesOption = Annotated[
    int, typer.Option(help="Documents or prompts per task, length and setting.")
]
FactsOption = Annotated[str, typer.Option(help="Planted facts of a document, comma separated.")]
TextSamplesOption = Annotated[int, typer.Option(help="Documents of the task text.")]
DecodedOption = Annotated[
    int, typer.Option(help="Tokens at a text's end that run under the decode rule.")
]
DataOption = Annotated[
    Path | None, typer.Option(help="Text of code and text tasks; default: Python sources.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


def names(text: str) -> tuple[str, ...]:
    """The words of a list such as `ruler,text`; empty ones are left out."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def attention_modes(text: str | None) -> tuple[Literal["dense", "sparse"], ...]:
    """Modes of a list such as `dense,sparse`; anything else is misuse, exit code 2."""
    found: list[Literal["dense", "sparse"]] = []
    for name in names(text or ""):
        if name == "dense":
            found.append("dense")
        elif name == "sparse":
            found.append("sparse")
        else:
            misused(f"{name!r} is neither dense nor sparse")
    return tuple(found)


def numbers(text: str) -> tuple[int, ...]:
    """Positive integers of a list such as `1,8`; anything else is misuse, exit code 2."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        misused(f"{text!r} is not a list of positive numbers such as 1,8")
    return found


def shares(text: str) -> tuple[float, ...]:
    """Numbers of a list such as `0,0.5,1`; anything else is misuse, exit code 2."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        misused(f"{text!r} is not a list of numbers such as 0,0.5,1")
