"""Settings of the whole suite, made before torch is imported."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kernels._launch import KernelLibrary


from tests.fuzzing import register_profiles
from tests.once import bytecode_first

register_profiles()
# Servers, engines and the tests themselves share two cores: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # a test process per core, so a thread per process
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A call such as httpx.get makes a client, which reads all of the system's certificates: ten times
# the work of a request. Nothing here speaks TLS, so they are looked for where there are none.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)
# Triton decides when a kernel is defined: interpreted on the CPU, compiled where there is a GPU.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Workers take whole files, these first: a run takes as long as its last file, so none of the long
# ones may be that. The longest of all waits most of its time and costs the others little.
LONG_FILES = [
    Path(__file__).parent / name
    for name in (
        "benchmarks/test_chaos.py",
        "simulation/test_simulation.py",
        "test_end_to_end.py",
        "observability/test_with_prometheus.py",
        "observability/test_pictures.py",
        "conversion/test_pipeline.py",
        "kernels/test_nvcc.py",
        "engine/test_generate_equivalence.py",
        "server/test_bad_inputs.py",
        "server/test_drain.py",
        "server/test_resume.py",
    )
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the others in their order."""
    places = {path: place for place, path in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Half a gigabyte of modules comes to stay: nobody is to look through it for garbage."""
    gc.disable()
    try:
        with bytecode_first(Path(__file__)):
            return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """As it was: libraries report what is not taken apart at the end."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def emulated_kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    """The CUDA kernels, compiled for the CPU once in a run: that takes longer than their tests."""
    from kernels._launch import KernelLibrary
    from tests.kernels.emulation.library import build
    from tests.once import made_once

    return KernelLibrary(made_once(tmp_path_factory, "emulated_kernels", build) / "emulated.so")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The simulation's seeds: the same ones in every run of the suite, others and more by night."""
    group = parser.getgroup("simulation")
    group.addoption("--simulation-seeds", type=int, default=2000, help="seeds to run")
    group.addoption("--simulation-first", type=int, default=0, help="the first seed")
