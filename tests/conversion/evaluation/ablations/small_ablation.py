"""Ablations that take seconds: their options, and what is read of their files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from conversion.evaluation.options import EvalOptions

QUIET = Console(file=io.StringIO())
LENGTH, POSITIONS = 800, 900  # tokens of a sample, of the models at most


def options(data: Path, **values: Any) -> EvalOptions:
    """Small ones for the text in a folder, or others by name."""
    small: dict[str, Any] = {
        "tasks": ("code_constant", "trace_counters"),
        "lengths": (LENGTH,),
        "samples": 1,
        "facts": (2,),
        "text_samples": 1,
        "decoded": 40,
        "data": data,
    }
    return EvalOptions(**{**small, **values})


def report(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Of one variant, out of the content of ablations.json."""
    own: dict[str, Any] = content["variants"][name]["report"]
    return own
