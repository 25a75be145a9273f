"""Every family on the kernels around attention, run on the CPU: what the PyTorch ops answer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.loading import load_engine_parts
from engine.messages import TokenLogprobs
from engine.model.config_reader import read_config
from engine.model.layer_kernels import LayerKernels
from engine.step import EngineParts
from engine.worker import ModelRunner
from kernels._launch import KernelLibrary
from tests.engine.decode_case import generate, greedy
from tests.engine.launch_count import LaunchCount
from tests.engine.model.tiny_models import FAMILIES, make_checkpoint
from tests.kernels.emulation.library import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")

SECTION: dict[str, Any] = {
    "format_version": 1,
    "retrieval_heads": [[1], [], [0, 3]],
    "window_tokens": 16,
    "sink_tokens": 4,
    "index_dim": 8,
    "index_scope": "query_head",
    "block_tokens": 16,
    "top_p": 0.5,
    "dense_below": 0,
}
YARN = {
    "rope_theta": 5000.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
PROMPTS = [[5 + i * 7 % 90 for i in range(31)], [9, 8, 7]]
WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "bincount",
    "unique",
    "masked_select",
    "repeat_interleave",
)


def write(family: str, folder: Path, **overrides: Any) -> Path:
    sizes = {"head_dim": 64, "num_attention_heads": 4}
    if family == "qwen2":
        sizes |= {"hidden_size": 256}  # no head_dim key: 256 / 4
    make_checkpoint(family, folder, section=SECTION, **sizes | overrides)
    return folder


def load(folder: Path) -> EngineParts:
    options = {"device": "cpu", "dtype": "float32", "threads": 1, "max_num_seqs": 2}
    return load_engine_parts(EngineConfig(model=str(folder), max_model_len=96, **options))  # type: ignore[arg-type]  # options are mixed


def answers(parts: EngineParts) -> tuple[list[list[int]], list[float]]:
    """Tokens of each request, and the log-probabilities of all of them in order."""
    logprobs: dict[int, list[float]] = {0: [], 1: []}

    def keep(request_id: int, entries: list[TokenLogprobs]) -> None:
        logprobs[request_id] += [entry.logprob for entry in entries]

    found = generate(parts, [(prompt, greedy(4, logprobs=0)) for prompt in PROMPTS], keep)
    return [tokens for tokens, *_ in found], [*logprobs[0], *logprobs[1]]


@pytest.mark.parametrize(
    ("family", "options"),
    [*((family, {}) for family in FAMILIES), ("llama", {"rope_parameters": YARN})],
    ids=[*FAMILIES, "yarn"],
)
def test_answers_are_those_of_the_ops(
    family: str,
    options: dict[str, Any],
    tmp_path: Path,
    emulated_kernels: KernelLibrary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write(family, tmp_path, **options)
    plain = answers(load(folder))
    monkeypatch.setattr("engine.loading.choose_kernels", lambda *_: emulated_kernels)
    parts = load(folder)
    assert isinstance(parts.runner, ModelRunner)
    assert parts.runner._decoder.kernels is not None
    fused = answers(parts)
    assert fused[0] == plain[0]
    assert fused[1] == pytest.approx(plain[1], abs=1e-4)


def test_a_decode_step_of_experts_waits_for_nothing(
    tmp_path: Path, emulated_kernels: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph cannot record: reading a number of the device, shapes that follow one."""
    folder = write("qwen3_moe", tmp_path)
    names: list[Counter[str]] = []
    for kernels in (None, emulated_kernels):
        monkeypatch.setattr("engine.loading.choose_kernels", lambda *_: emulated_kernels)
        runner = load(folder).runner
        assert isinstance(runner, ModelRunner)
        assert runner._decode is not None
        if kernels is None:
            runner._decoder.kernels = runner._layers.layer_kernels = None
        with monkeypatch.context() as inside, torch.no_grad(), LaunchCount(inside) as count:
            runner._decode._compute(2)
        names.append(count.names)
    plain, fused = names
    assert plain["bincount"] > 0, "the count sees what waits"
    assert not [name for name in WAITS if fused[name]]
    assert fused["route_experts"] == 2
    assert fused["expert_products"] == 4, "two of three layers have experts"


def test_sizes_without_kernels(tmp_path: Path) -> None:
    model = read_config(write("qwen3_moe", tmp_path))
    assert LayerKernels.take(model, torch.float32)
    assert not LayerKernels.take(model, torch.float16)
    assert model.moe is not None
    assert LayerKernels.takes_experts(1024, model.moe)
    assert not LayerKernels.takes_experts(1025, model.moe)
    make_checkpoint("qwen3", tmp_path / "odd", intermediate_size=82)
    assert not LayerKernels.take(read_config(tmp_path / "odd"), torch.float32)
