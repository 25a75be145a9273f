"""Options of an evaluation that takes seconds, with tasks of every kind."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from conversion.evaluation.options import EvalOptions

QUIET = Console(file=io.StringIO())
POSITIONS = 2048  # of the models
TASKS_OF_EVERY_KIND = ("code_constant", "code_passkey", "passkey", "trace_counters", "text")


def options(text: Path, **values: Any) -> EvalOptions:
    """Small ones for the text in a folder, or others by name."""
    small: dict[str, Any] = {
        "tasks": TASKS_OF_EVERY_KIND,
        "lengths": (1200,),
        "samples": 2,
        "facts": (1, 2),
        "depths": (0.0, 1.0),
        "text_samples": 2,
        "decoded": 50,
        "data": text,
    }
    return EvalOptions(**{**small, **values})
