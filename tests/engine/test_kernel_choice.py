"""Which kernels attention runs on, and that the log says why."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from engine import kernel_choice
from engine.config import AttentionMode, EngineConfig, KernelMode
from engine.errors import ConfigError
from engine.kernel_choice import choose_kernels, choose_prefill
from engine.loading import _max_blocks
from kernels._build import KernelBuildError
from kernels._launch import KernelLibrary
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
    assert choose_kernels(mode, None, MODEL, device, torch.float32, 16, 16) is None
    assert message in reason(caplog)


@pytest.mark.usefixtures("a_gpu")
def test_no_library_means_the_ops_unless_the_kernels_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(cache: Path) -> Path:
        raise KernelBuildError(f"nothing in {cache}")

    monkeypatch.setattr(kernel_choice, "find_library", missing)
    caplog.set_level(logging.INFO)
    assert choose_kernels("auto", "/some/folder", MODEL, CUDA, torch.float32, 16, 16) is None
    assert "nothing in /some/folder" in reason(caplog)
    with pytest.raises(ConfigError, match="not possible: nothing in /some/folder"):
        choose_kernels("cuda", "/some/folder", MODEL, CUDA, torch.float32, 16, 16)


@pytest.mark.usefixtures("a_gpu")
def test_pages_that_the_kernels_do_not_take(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert choose_kernels("auto", None, MODEL, CUDA, torch.float32, 8, 32) is None
    assert "8 tokens, not a multiple of 16" in reason(caplog)


@pytest.mark.usefixtures("a_gpu")
def test_contexts_that_the_kernels_do_not_take(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert choose_kernels("auto", None, MODEL, CUDA, torch.float32, 16, 65536) is None
    assert "65536 pages, more than 65535; a lower max_model_len would do" in reason(caplog)


@pytest.mark.usefixtures("a_gpu")
def test_what_is_served_decides_and_not_what_the_model_could_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model of millions of positions, of which few are served."""
    model = dataclasses.replace(MODEL, max_position_embeddings=2**22)
    few = EngineConfig(model="unused", max_model_len=2**20)
    blocks = _max_blocks(few, model, 16)
    assert blocks == 65536
    asked: list[object] = []
    monkeypatch.setattr(kernel_choice, "find_library", asked.append)
    monkeypatch.setattr(kernel_choice, "KernelLibrary", lambda _: FakeLibrary())
    given = (None, model, CUDA, torch.float32, 16)
    assert choose_kernels("auto", *given, blocks) is None
    assert choose_kernels("auto", *given, blocks - 1) is not None
    assert len(asked) == 1


class FakeLibrary:
    """Has every kernel."""

    def decode_plan(self, *_: object) -> None: ...
    def select_plan(self, *_: object) -> None: ...


def test_cuda_kernels_on_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="the device is cpu"):
        choose_kernels("cuda", None, MODEL, torch.device("cpu"), torch.float32, 16, 16)


class FakePrefill:
    """Kernels of prompt tokens on a GPU that is not there."""

    name = "CUDA"
    problem: Exception | None = None

    def __init__(self, *_: object) -> None:
        self.tried: list[int | None] = []

    def try_out(self, index_dim: int | None) -> None:
        self.tried.append(index_dim)
        if self.problem is not None:
            raise self.problem


@pytest.fixture
def fake_prefill(monkeypatch: pytest.MonkeyPatch, a_gpu: None) -> type[FakePrefill]:
    class Fresh(FakePrefill): ...

    monkeypatch.setattr(kernel_choice, "DevicePrefill", Fresh)
    return Fresh


def prefill(
    mode: KernelMode, device: torch.device = CUDA, attention: AttentionMode = "dense"
) -> object:
    library: KernelLibrary | None = None
    return choose_prefill(mode, library, MODEL, device, torch.float32, 16, attention)


@pytest.mark.parametrize(
    ("mode", "device", "message"),
    [
        (
            "auto",
            torch.device("cpu"),
            "prefill attention runs on the PyTorch ops: the device is cpu",
        ),
        ("torch", CUDA, "PyTorch ops: the setting kernels says so"),
    ],
)
def test_prefill_on_the_ops_has_its_reason(
    mode: KernelMode, device: torch.device, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert prefill(mode, device) is None
    assert message in reason(caplog)


@pytest.mark.parametrize(("attention", "tried"), [("dense", None), ("sparse", 8)])
def test_prefill_kernels_are_tried_out(
    fake_prefill: type[FakePrefill],
    attention: AttentionMode,
    tried: int | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    found = prefill("auto", attention=attention)
    assert isinstance(found, FakePrefill)
    assert found.tried == [tried]
    assert "prefill attention runs on the CUDA kernels" in reason(caplog)


def test_prefill_kernels_that_fail_when_tried_give_way_unless_asked_for(
    fake_prefill: type[FakePrefill], caplog: pytest.LogCaptureFixture
) -> None:
    """A host without a C compiler cannot build what Triton needs: better known before ready."""
    fake_prefill.problem = RuntimeError("Failed to find C compiler.\nSet CC.")
    caplog.set_level(logging.INFO)
    assert prefill("auto") is None
    assert reason(caplog).endswith("PyTorch ops: RuntimeError: Failed to find C compiler.")
    with pytest.raises(ConfigError, match="not possible for prefill: RuntimeError: Failed"):
        prefill("cuda")
