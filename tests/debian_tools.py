"""Programs that no Python package brings: Prometheus and nginx, as Debian has them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "debian-tools"  # where `make test` unpacks them


def tool(name: str) -> str:
    """The path of a program; skips the test where nobody can have it.

    Where root and apt-get can get it, a missing one is a mistake of the set-up.
    """
    found = shutil.which(name) or shutil.which(FOLDER / "bin" / name)
    if found is None and os.getuid() == 0 and shutil.which("apt-get"):
        pytest.fail(f"{name} is missing: sh tests/get_debian_tools.sh {FOLDER}")
    if found is None:
        pytest.skip(f"{name} is not installed, and there is no apt-get or no root to get it")
    return found
