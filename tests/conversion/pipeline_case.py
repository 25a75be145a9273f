"""A conversion of few steps that says nothing, and what one says that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from conversion.errors import ConversionError
from conversion.fit_options import FitOptions
from conversion.pipeline import ConvertOptions, convert
from engine.errors import CheckpointError

QUIET = Console(quiet=True)
QUICK = FitOptions(
    steps=3, queries=16, moment_documents=1, trial_documents=1, quality_documents=1, save_every=2
)


def refusal(model: Path, out: Path, options: ConvertOptions) -> str:
    with pytest.raises((ConversionError, CheckpointError)) as caught:
        convert(model, out, options, QUIET)
    message = str(caught.value)
    assert "\n" not in message
    return message
