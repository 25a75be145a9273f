"""A little text to train on, and a folder to train in."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

VOCABULARY = 800
PACKAGES = ("asyncio", "json", "http", "logging")


def text_folders() -> tuple[Path, ...]:
    """A few packages of the standard library: real text, read in a second."""
    return tuple(Path(sysconfig.get_paths()["stdlib"]) / name for name in PACKAGES)


def copy_of(prepared: Path, folder: Path) -> Path:
    """Likewise, to change."""
    shutil.copytree(prepared, folder)
    return folder
