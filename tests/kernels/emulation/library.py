"""Builds the emulated kernels with the host's C++ compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import kernels
from kernels._launch import KernelLibrary

SOURCES = Path(kernels.__file__).parent / "csrc"


def compiler() -> str | None:
    """A C++20 compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++")


def build_emulation(folder: Path) -> KernelLibrary:
    """Compile every kernel into one library in `folder`; raises CalledProcessError."""
    found = compiler()
    assert found is not None
    flags = ["-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC"]
    objects = []
    for source in sorted(SOURCES.glob("*.cu")):
        objects.append(str(folder / f"{source.stem}.o"))
        include = ["-I", str(Path(__file__).parent)]
        command = [found, *flags, *include, "-x", "c++", "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    library = folder / "emulated.so"
    subprocess.run([found, "-shared", *objects, "-o", str(library)], check=True)
    return KernelLibrary(library)
