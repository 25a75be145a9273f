"""The model that ships with the project; `rtpurbo serve` without MODEL takes it. Torch-free."""

from pathlib import Path

EMBEDDED_MODEL_NAME = "code-11m-sparse"


def embedded_model_path() -> Path:
    """Folder of the embedded model; its README.md says what it is."""
    return Path(__file__).resolve().parent / "embedded_model"
