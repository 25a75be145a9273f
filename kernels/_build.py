"""Compiles `csrc` with nvcc into one shared library, once, and finds it again.

The library has a plain C interface and links CUDA's runtime statically, so it depends on neither
the torch version nor on CUDA libraries of the host. A cache folder holds, for every build,

    rtpurbo-<sources>-<tools>.so     sources: hash of csrc and flags; tools: of nvcc and targets
    rtpurbo-<sources>-<tools>.json   nvcc's version and the targets

A host with nvcc takes the library of exactly its sources, compiler and targets, and builds it if it
is not there. Without nvcc, or where the folder is read-only, any library of the same sources that
has code for the GPU will do: an image works with a folder that was filled when it was made.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=c++17", "--cudart=static", "-Xcompiler", "-fPIC")
# Plain code also runs on later chips of its generation (code for 9.0 on 9.x and so on). Only these
# sources need the instructions of 9.0a; for other targets their kernels are empty.
HOPPER_SOURCES = ("span_prefill",)
TARGETS = ("80", "86", "89", "90", "100", "120")
BUILD_SECONDS = 900
FALLBACK = "attention falls back to the PyTorch ops"


class KernelBuildError(Exception):
    """No kernels for this host; the message is one line and says what runs instead."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """nvcc: where it is and what it says its version is."""

    path: str
    version: str

    @classmethod
    def find(cls, path: str | None = None) -> Compiler | None:
        """nvcc at `path`, on the PATH or in /usr/local/cuda; None if there is none that runs."""
        found = path or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        if found is None:
            return None
        try:
            done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        match = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
        return cls(found, match.group(1)) if match else None

    def command(self, source: Path, output: Path, targets: Sequence[str]) -> list[str]:
        """The compilation of one source to an object."""
        if source.stem in HOPPER_SOURCES:
            targets = ["90a" if target == "90" else target for target in targets]
        codes = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
        return [self.path, *FLAGS, *codes, "-c", str(source), "-o", str(output)]


def default_cache() -> Path:
    """Where libraries are kept unless a folder is named."""
    return Path.home() / ".cache" / "rtpurbo" / "kernels"


def local_targets() -> tuple[str, ...]:
    """Target of the GPU at hand; empty without one."""
    if not torch.cuda.is_available():
        return ()
    major, minor = torch.cuda.get_device_capability()
    return (f"{major}{minor}",)


def find_library(
    cache: Path, targets: Sequence[str] | None = None, compiler: Compiler | None = None
) -> Path:
    """The library for these targets, built if need be.

    Args:
        cache: made with mode 0700 if it is not there.
        targets: compute capabilities without the dot; None: that of the GPU at hand.
        compiler: None looks for nvcc.

    Raises:
        KernelBuildError: no GPU and no targets, no nvcc and nothing built before, a cache that
            others may write to, or nvcc failed.
    """
    targets = tuple(targets or local_targets())
    if not targets:
        raise KernelBuildError(f"no GPU to build kernels for; name targets, or {FALLBACK}")
    for target in targets:
        if not re.fullmatch(r"\d{2,3}[af]?", target):
            raise KernelBuildError(f"{target!r} is not a target such as 90 or 120")
    compiler = compiler or Compiler.find()
    if compiler is None:
        return _built_before(cache, targets, "no nvcc on this host")
    library = cache / f"rtpurbo-{source_hash()}-{_tool_hash(compiler, targets)}.so"
    try:
        is_built = library.exists()
    except PermissionError as error:
        raise KernelBuildError(f"cannot look into {cache}: {error.strerror}; {FALLBACK}") from None
    if is_built:
        _check_private(cache)
        return library
    if cache.exists() and not os.access(cache, os.W_OK):
        return _built_before(cache, targets, "the folder cannot be written to")
    return _build(cache, library, targets, compiler)


def source_hash() -> str:
    """Hash of all sources and flags."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cu", ".cuh", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _tool_hash(compiler: Compiler, targets: Sequence[str]) -> str:
    text = repr((compiler.version, sorted(targets)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _built_before(cache: Path, targets: Sequence[str], reason: str) -> Path:
    """A library of these sources by whatever nvcc, with code for all targets."""
    for path in sorted(cache.glob(f"rtpurbo-{source_hash()}-*.so")):
        try:
            built = json.loads(path.with_suffix(".json").read_text())["targets"]
        except (OSError, ValueError, KeyError):
            continue
        if all(any(_runs_on(code, target) for code in built) for target in targets):
            _check_private(cache)
            return path
    names = ", ".join(f"sm_{target}" for target in targets)
    raise KernelBuildError(
        f"no kernels for {names} in {cache}, and {reason}: run `rtpurbo build-kernels` where there "
        f"is a CUDA toolkit and bring the folder here; until then {FALLBACK}"
    )


def _runs_on(code: str, target: str) -> bool:
    """Whether machine code for `code` runs on a chip of `target`: same major, no newer minor."""
    if code.endswith(("a", "f")) or target.endswith(("a", "f")):
        return code == target
    return code[:-1] == target[:-1] and code[-1] <= target[-1]


def _check_private(cache: Path) -> None:
    """Code is loaded from here: nobody but its owner may have put it there.

    Raises:
        KernelBuildError: the folder belongs to another user, or others may write to it.
    """
    status = cache.stat()
    if status.st_uid not in (0, os.getuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KernelBuildError(f"{cache} must belong to you and be writable by nobody else")


def _build(cache: Path, library: Path, targets: Sequence[str], compiler: Compiler) -> Path:
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(cache)
        with _locked(cache / ".lock"):
            if not library.exists():  # whoever held the lock may have built it
                _compile(cache, library, targets, compiler)
    except OSError as error:
        raise KernelBuildError(
            f"cannot build kernels in {cache}: {error.strerror}; {FALLBACK}"
        ) from None
    return library


def _compile(cache: Path, library: Path, targets: Sequence[str], compiler: Compiler) -> None:
    """Objects side by side, one link; the library appears under its name only when it is whole."""
    with tempfile.TemporaryDirectory(dir=cache) as name:
        folder = Path(name)
        sources = sorted(SOURCES.glob("*.cu"))
        objects = [folder / f"{source.stem}.o" for source in sources]
        run_all([compiler.command(s, o, targets) for s, o in zip(sources, objects, strict=True)])
        linked, notes = folder / library.name, folder / "notes.json"
        parts = [str(path) for path in objects]
        run_all([[compiler.path, "--shared", "--cudart=static", "-o", str(linked), *parts]])
        notes.write_text(json.dumps({"nvcc": compiler.version, "targets": list(targets)}))
        notes.replace(library.with_suffix(".json"))
        linked.replace(library)


def run_all(commands: Sequence[Sequence[str]]) -> None:
    """Run commands side by side; raises KernelBuildError with the first error line of one."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=BUILD_SECONDS)[0] for process in running]
    except subprocess.TimeoutExpired:
        raise KernelBuildError(f"nvcc took more than {BUILD_SECONDS} s; {FALLBACK}") from None
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    for process, output in zip(running, outputs, strict=True):
        if process.returncode != 0:
            lines = [line.strip() for line in output.splitlines() if line.strip()]
            shown = next((line for line in lines if "error" in line), lines[-1] if lines else "")
            raise KernelBuildError(f"nvcc failed: {shown}; {FALLBACK}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time, over processes; released by the system if the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
