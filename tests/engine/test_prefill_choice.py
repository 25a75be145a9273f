"""Which kernels compute prompts, and that the log says why."""

from __future__ import annotations

import logging

import pytest
import torch

from engine import kernel_choice
from engine.config import AttentionMode, KernelMode
from engine.errors import ConfigError
from engine.kernel_choice import choose_prefill
from engine.model.config import ModelConfig
from kernels._launch import KernelLibrary
from tests.engine.head_map_model import make_model
from tests.engine.kernel_choice_case import CUDA, MODEL, reason


class FakePrefill:
    """Kernels of prompt tokens on a GPU that is not there."""

    name = "CUDA"
    problem: Exception | None = None

    def __init__(self, *_: object) -> None:
        self.tried: list[tuple[int | None, bool]] = []

    def try_out(self, index_dim: int | None, *, has_age_bias: bool) -> None:
        self.tried.append((index_dim, has_age_bias))
        if self.problem is not None:
            raise self.problem


@pytest.fixture
def fake_prefill(monkeypatch: pytest.MonkeyPatch, a_gpu: None) -> type[FakePrefill]:
    class Fresh(FakePrefill): ...

    monkeypatch.setattr(kernel_choice, "DevicePrefill", Fresh)
    return Fresh


def prefill(
    mode: KernelMode,
    device: torch.device = CUDA,
    attention: AttentionMode = "dense",
    model: ModelConfig = MODEL,
) -> object:
    library: KernelLibrary | None = None
    return choose_prefill(mode, library, model, device, torch.float32, 16, attention)


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


@pytest.mark.parametrize(
    ("attention", "model", "tried"),
    [
        ("dense", MODEL, (None, False)),
        ("sparse", MODEL, (8, False)),
        ("sparse", make_model([[0]], dim=64, index_dim=8, block=16, age_bias=True), (8, True)),
    ],
    ids=["dense", "sparse", "sparse-with-a-bias"],
)
def test_prefill_kernels_are_tried_out(
    fake_prefill: type[FakePrefill],
    attention: AttentionMode,
    model: ModelConfig,
    tried: tuple[int | None, bool],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    found = prefill("auto", attention=attention, model=model)
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
