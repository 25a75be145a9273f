"""Changed weights find their way into the files of a model that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conversion.errors import ConversionError
from conversion.trained_weights import stored_order, write_shards, write_trained
from engine.model.checkpoint import Checkpoint, preflight
from engine.model.weights import load_decoder, stored_tensors
from tests.engine.model.tiny_models import FAMILIES, make_checkpoint


def trained(checkpoint: Checkpoint, path: Path, change: float) -> dict[str, Tensor]:
    """Write all weights of a model plus `change`; what was written."""
    decoder = load_decoder(checkpoint, "cpu", torch.float32)
    changed = {name: tensor + change for name, tensor in stored_tensors(decoder)}
    write_trained(path, checkpoint, changed.items())
    return changed


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_changed_weights(family: str, tmp_path: Path) -> None:
    source, folder = tmp_path / "model", tmp_path / "out"
    make_checkpoint(family, source)
    checkpoint = preflight(source)
    changed = trained(checkpoint, tmp_path / "student.safetensors", 0.25)
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())

    write_shards(checkpoint, tmp_path / "student.safetensors", folder)

    factory: Any = AutoModelForCausalLM
    expected = factory.from_pretrained(source, dtype=torch.float32).state_dict()
    found = factory.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name] + 0.25), name
    assert len(changed) == len(stored_order(checkpoint))


def sharded(folder: Path, dtype: torch.dtype) -> Checkpoint:
    """A tied model in two shards that stores its head as well, and a buffer of old times."""
    make_checkpoint("qwen3", folder, tie_word_embeddings=True)
    tensors = {n: t.to(dtype) for n, t in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return preflight(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_shards_keep_their_shape(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = sharded(tmp_path / "model", dtype)
    changed = trained(checkpoint, tmp_path / "student.safetensors", 0.5)
    out = tmp_path / "out"
    out.mkdir()

    write_shards(checkpoint, tmp_path / "student.safetensors", out)

    assert sorted(p.name for p in out.iterdir()) == ["model-1.safetensors", "model-2.safetensors"]
    for file in out.iterdir():
        before, after = (load_file(folder / file.name) for folder in (tmp_path / "model", out))
        assert file.stat().st_size == (tmp_path / "model" / file.name).stat().st_size
        assert before.keys() == after.keys()
        for name, tensor in after.items():
            if name.endswith("inv_freq"):
                assert torch.equal(tensor, before[name])
                continue
            tied = "model.embed_tokens.weight" if name == "lm_head.weight" else name
            assert torch.equal(tensor, changed[tied].to(dtype)), name


def test_what_was_written_before_is_replaced_whole(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "model")
    checkpoint, path = preflight(tmp_path / "model"), tmp_path / "student.safetensors"
    trained(checkpoint, path, 0.25)
    before = path.read_bytes()

    def broken() -> Any:
        decoder = load_decoder(checkpoint, "cpu", torch.float32)
        for place, (name, tensor) in enumerate(stored_tensors(decoder)):
            if place == 5:
                raise OSError(28, "No space left on device")
            yield name, tensor

    with pytest.raises(ConversionError, match=r"cannot be written \(No space left"):
        write_trained(path, checkpoint, broken())

    assert path.read_bytes() == before


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "model")
    make_checkpoint("llama", tmp_path / "other", hidden_size=96)
    path = tmp_path / "student.safetensors"
    trained(preflight(tmp_path / "other"), path, 0.25)
    with pytest.raises(ConversionError, match="is not of this model"):
        write_shards(preflight(tmp_path / "model"), path, tmp_path / "out")
