"""Builds the emulated kernels with the host's C++ compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernels

SOURCES = Path(kernels.__file__).parent / "csrc"


def compiler() -> str | None:
    """A C++20 compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++")


def build(folder: Path) -> None:
    """Leaves `emulated.so` in an empty folder.

    Raises:
        CalledProcessError: a source does not compile.
    """
    found = compiler()
    assert found is not None
    flags = ["-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC"]
    flags += ["-I", str(Path(__file__).parent)]
    # To read the standard library takes longer than to compile a source: all read it at once.
    common = folder / "common.h"
    common.write_text('#include "emulated_device.h"\n')
    _run(found, *flags, "-x", "c++-header", str(common), "-o", f"{common}.gch")

    def compile_source(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        _run(found, *flags, "-include", str(common), "-x", "c++", "-c", str(source), "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, sorted(SOURCES.glob("*.cu"))))
    _run(found, "-shared", *objects, "-o", str(folder / "emulated.so"))
    Path(f"{common}.gch").unlink()  # 80 MB


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
