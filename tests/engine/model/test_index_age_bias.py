"""The bias by age in a model folder: what loads, and what is refused with the tensor's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.model import checkpoint
from engine.model.checkpoint import indexer_shapes, preflight
from engine.model.weights import load_decoder
from kernels.block_age import AGE_RANGES
from tests.engine.tiny_checkpoint import TinyModel, write_checkpoint

MODEL = TinyModel(index_age_bias=True)  # retrieval heads in layers 0 and 2
BIAS = "model.layers.{}.self_attn.indexer.age_bias"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", MODEL)


def test_it_stays_float32_whatever_the_model_is(folder: Path) -> None:
    stored = load_file(folder / "indexer.safetensors")
    decoder = load_decoder(folder, "cpu", torch.bfloat16)
    assert [indexer is not None for indexer in decoder.indexers] == [True, False, True]
    for layer, indexer in enumerate(decoder.indexers):
        if indexer is not None:
            assert indexer.q_proj_HID.dtype == torch.bfloat16
            assert indexer.age_bias_HA is not None
            assert indexer.age_bias_HA.dtype == torch.float32
            assert torch.equal(indexer.age_bias_HA, stored[BIAS.format(layer)])


def test_it_counts_as_memory_of_the_model(folder: Path, tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", TinyModel())
    sizes = [load_decoder(path, "cpu", torch.float32).num_bytes for path in (folder, plain)]
    assert sizes[0] - sizes[1] == 3 * AGE_RANGES * 4  # three retrieval heads


def test_without_the_key_there_is_none(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, TinyModel())
    config = json.loads((folder / "config.json").read_text())
    del config["rtpurbo"]["index_age_bias"]  # as folders had it before there was one
    (folder / "config.json").write_text(json.dumps(config))
    assert not any("age_bias" in name for name in indexer_shapes(preflight(folder).config))
    indexers = load_decoder(folder, "cpu", torch.float32).indexers
    assert all(indexer is None or indexer.age_bias_HA is None for indexer in indexers)


def test_ranges_are_those_of_the_kernels() -> None:
    """The check of a folder needs no torch, so it has a number of its own."""
    assert checkpoint.AGE_RANGES == AGE_RANGES


Tensors = dict[str, Tensor]


def _replace(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda tensors: tensors.pop(BIAS.format(2)),
            f"tensor '{BIAS.format(2)}' is missing",
            id="missing",
        ),
        pytest.param(
            _replace(BIAS.format(1), torch.zeros(1, 16)),
            f"tensor '{BIAS.format(1)}' belongs to no retrieval head with an indexer",
            id="of-a-layer-without-retrieval-heads",
        ),
        pytest.param(
            _replace(BIAS.format(0), torch.zeros(1, 16)),
            f"tensor '{BIAS.format(0)}' has shape [1, 16], not [2, 16]",
            id="too-few-heads",
        ),
        pytest.param(
            _replace(BIAS.format(0), torch.zeros(2, 15)),
            f"tensor '{BIAS.format(0)}' has shape [2, 15], not [2, 16]",
            id="too-few-ranges",
        ),
        pytest.param(
            _replace(BIAS.format(0), torch.zeros(2, 16, dtype=torch.bfloat16)),
            f"tensor '{BIAS.format(0)}' has dtype BF16, not F32",
            id="not-float32",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(
    folder: Path, change: Callable[[Tensors], Any], message: str
) -> None:
    file = folder / "indexer.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        preflight(folder)
    assert str(caught.value) == f"{file}: {message}"


@pytest.mark.parametrize("value", [torch.nan, -torch.inf], ids=str)
def test_a_bias_that_is_not_finite_is_refused(folder: Path, value: float) -> None:
    """No block of such an age would ever be selected, and nothing would say why."""
    file = folder / "indexer.safetensors"
    tensors = load_file(file)
    tensors[BIAS.format(2)][0, 5] = value
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        load_decoder(folder, "cpu", torch.float32)
    assert str(caught.value) == f"{file}: tensor '{BIAS.format(2)}' is not finite"


def test_tensors_that_config_json_does_not_name_are_refused(folder: Path) -> None:
    """Served without them, the model would select other blocks than it was trained to."""
    config = json.loads((folder / "config.json").read_text())
    config["rtpurbo"]["index_age_bias"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"age_bias' is there, but config\.json has no"):
        preflight(folder)
