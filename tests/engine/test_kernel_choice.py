"""Which kernels attention runs on, and that the log says why."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from engine import kernel_choice
from engine.config import EngineConfig, KernelMode
from engine.errors import ConfigError
from engine.kernel_choice import choose_kernels, choose_layer_kernels
from engine.memory_budget import max_blocks
from engine.model.layer_kernels import LayerKernels
from kernels._build import KernelBuildError
from kernels._launch import KernelLibrary
from tests.engine.head_map_model import make_model
from tests.engine.kernel_choice_case import CUDA, MODEL, reason
from tests.kernels.emulation.library import compiler
from tests.kernels.trial_case import break_kernel

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")


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
    blocks = max_blocks(few, model, 16)
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


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, emulated_kernels: KernelLibrary) -> KernelLibrary:
    """The choice finds the kernels, emulated on the CPU."""
    monkeypatch.setattr(kernel_choice, "_library", lambda *_: emulated_kernels)
    return emulated_kernels


CPU = torch.device("cpu")


@needs_compiler
def test_kernels_that_give_the_known_answers_are_taken(
    emulated: KernelLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = choose_kernels("cuda", None, MODEL, CPU, torch.float32, 16, 16)
    assert found is emulated
    assert reason(caplog) == "decode attention runs on the CUDA kernels"
    layers = choose_layer_kernels("cuda", emulated, MODEL, CPU, torch.float32, 16, "int8")
    assert isinstance(layers, LayerKernels)
    small = make_model([[0]], dim=8)
    assert choose_layer_kernels("cuda", emulated, small, CPU, torch.float32, 16) is None


@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "field"), [("index_select", "attended"), ("sparse_decode", "out")]
)
def test_wrong_decode_kernels_give_way_with_a_warning_unless_asked_for(
    kernel: str,
    field: str,
    emulated: KernelLibrary,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    break_kernel(monkeypatch, emulated, kernel, field)
    given = (None, MODEL, CPU, torch.float32, 16, 16)
    assert choose_kernels("auto", *given) is None
    said = f"{kernel} gives wrong results on this device: off by"
    assert caplog.records[0].levelno == logging.WARNING
    assert reason(caplog).startswith(f"decode attention runs on the PyTorch ops: {said}")
    with pytest.raises(ConfigError, match=f"kernels cuda is not possible: {said}"):
        choose_kernels("cuda", *given)


@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "field"), [("qkv_store", "queries"), ("silu_mul", "out"), ("pick_tokens", "out")]
)
def test_wrong_layer_kernels_give_way_with_a_warning_unless_asked_for(
    kernel: str,
    field: str,
    emulated: KernelLibrary,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    break_kernel(monkeypatch, emulated, kernel, field)
    given = (emulated, MODEL, CPU, torch.float32, 16)
    assert choose_layer_kernels("auto", *given) is None
    said = f"{kernel} gives wrong results on this device: off by"
    assert caplog.records[0].levelno == logging.WARNING
    assert reason(caplog).startswith(f"layers beside attention run on the PyTorch ops: {said}")
    with pytest.raises(ConfigError, match=f"kernels cuda is not possible for layers: {said}"):
        choose_layer_kernels("cuda", *given)


@needs_compiler
@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_a_device_that_a_kernel_broke_is_not_fallen_back_on(
    mode: KernelMode, emulated: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error of this kind every call in the process fails, those of the PyTorch ops too."""

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("engine.kernel_trials.try_decode", fail)
    monkeypatch.setattr("engine.kernel_trials.try_layers", fail)
    with pytest.raises(ConfigError, match=r"illegal memory access.*this process cannot go on"):
        choose_kernels(mode, None, MODEL, CPU, torch.float32, 16, 16)
    with pytest.raises(ConfigError, match=r"illegal memory access.*this process cannot go on"):
        choose_layer_kernels(mode, emulated, MODEL, CPU, torch.float32, 16)
