"""Builds the emulated kernels with the host's C++ compiler, once for all processes of a run."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernels
from kernels._launch import KernelLibrary

SOURCES = Path(kernels.__file__).parent / "csrc"


def compiler() -> str | None:
    """A C++20 compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++")


def emulation(folder: Path) -> KernelLibrary:
    """The kernels in `folder`; the first process that asks compiles them, others wait for it.

    Raises:
        CalledProcessError: a source does not compile.
    """
    folder.mkdir(exist_ok=True)
    library = folder / "emulated.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(library)
    return KernelLibrary(library)


def _build(library: Path) -> None:
    """Compile every source; the library appears under its name only when it is whole."""
    found = compiler()
    assert found is not None
    flags = ["-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC"]
    flags += ["-I", str(Path(__file__).parent)]
    # To read the standard library takes longer than to compile a source: all read it at once.
    common = library.with_name("common.h")
    common.write_text('#include "emulated_device.h"\n')
    _run(found, *flags, "-x", "c++-header", str(common), "-o", f"{common}.gch")

    def compile_source(source: Path) -> str:
        target = str(library.with_name(f"{source.stem}.o"))
        _run(found, *flags, "-include", str(common), "-x", "c++", "-c", str(source), "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, sorted(SOURCES.glob("*.cu"))))
    linked = library.with_suffix(".new")
    _run(found, "-shared", *objects, "-o", str(linked))
    Path(f"{common}.gch").unlink()  # 80 MB
    linked.replace(library)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
