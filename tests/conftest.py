"""Settings of the whole suite, made before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kernels._launch import KernelLibrary


from tests.fuzzing import register_profiles

register_profiles()
# Servers, engines and the tests themselves share two cores: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # a test process per core, so a thread per process
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton decides when a kernel is defined: interpreted on the CPU, compiled where there is a GPU.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def emulated_kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    """The CUDA kernels, compiled for the CPU once: it takes longer than most tests of them."""
    from tests.kernels.emulation.library import build_emulation

    return build_emulation(tmp_path_factory.mktemp("emulated"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """The simulation's seeds: the same ones in every run of the suite, others and more by night."""
    group = parser.getgroup("simulation")
    group.addoption("--simulation-seeds", type=int, default=2000, help="seeds to run")
    group.addoption("--simulation-first", type=int, default=0, help="the first seed")
