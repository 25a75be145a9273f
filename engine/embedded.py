"""Where the model that ships with the project lies. Torch-free."""

from __future__ import annotations

from pathlib import Path


def embedded_model_path() -> Path:
    """Folder of the embedded sparse model, which `rtpurbo serve` takes by default."""
    return Path(__file__).resolve().parent / "embedded_model"
