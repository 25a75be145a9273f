"""Which kernels decode runs on, and that the log says why."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from engine import kernel_choice
from engine.config import KernelMode
from engine.errors import ConfigError
from engine.kernel_choice import choose_kernels
from kernels._build import KernelBuildError
from tests.engine.paged_driver import make_model

MODEL = make_model([[0]], dim=64, index_dim=8, block=16)
CUDA = torch.device("cuda")


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the choice can see."""

    class Anything:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Anything)


def reason(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = caplog.records
    return record.getMessage()


@pytest.mark.parametrize(
    ("mode", "device", "message"),
    [
        ("auto", torch.device("cpu"), "PyTorch ops: the device is cpu"),
        ("torch", CUDA, "PyTorch ops: the setting kernels says so"),
    ],
)
def test_the_log_names_the_reason(
    mode: KernelMode,
    device: torch.device,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    assert choose_kernels(mode, None, MODEL, device, torch.float32, 16) is None
    assert message in reason(caplog)


@pytest.mark.usefixtures("a_gpu")
def test_no_library_means_the_ops_unless_the_kernels_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(cache: Path) -> Path:
        raise KernelBuildError(f"nothing in {cache}")

    monkeypatch.setattr(kernel_choice, "find_library", missing)
    caplog.set_level(logging.INFO)
    assert choose_kernels("auto", "/some/folder", MODEL, CUDA, torch.float32, 16) is None
    assert "nothing in /some/folder" in reason(caplog)
    with pytest.raises(ConfigError, match="not possible: nothing in /some/folder"):
        choose_kernels("cuda", "/some/folder", MODEL, CUDA, torch.float32, 16)


@pytest.mark.usefixtures("a_gpu")
def test_pages_that_the_kernels_do_not_take(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert choose_kernels("auto", None, MODEL, CUDA, torch.float32, 8) is None
    assert "8 tokens, not a multiple of 16" in reason(caplog)


@pytest.mark.usefixtures("a_gpu")
def test_contexts_that_the_kernels_do_not_take(caplog: pytest.LogCaptureFixture) -> None:
    model = dataclasses.replace(MODEL, max_position_embeddings=2**21)
    caplog.set_level(logging.INFO)
    assert choose_kernels("auto", None, model, CUDA, torch.float32, 16) is None
    assert "131072 pages, more than 65535" in reason(caplog)


def test_cuda_kernels_on_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="the device is cpu"):
        choose_kernels("cuda", None, MODEL, torch.device("cpu"), torch.float32, 16)
