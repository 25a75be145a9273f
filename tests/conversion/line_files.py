"""Text for conversions of random models."""

from __future__ import annotations

from pathlib import Path


def line_files(folder: Path) -> Path:
    """The folder, made, with thirty short Python files in it."""
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.py").write_text(f"value_{number} = [{number}, 'text']\n" * 40)
    return folder
