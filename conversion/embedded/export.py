"""The trained network as a folder that transformers and the server load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from conversion.embedded.corpus import END_TEXT
from conversion.embedded.network import Network
from conversion.export import new_folder
from engine.model.checkpoint import INDEX_FILE
from engine.model.weights import stored_tensors

SHARD_BYTES = 12 * 2**20


def export_network(network: Network, config: dict[str, Any], tokenizer: Path, out: Path) -> None:
    """Write bfloat16 shards, config.json and the tokenizer's files: a whole folder or none.

    Raises:
        ConversionError: `out` exists, or cannot be written.
    """
    with new_folder(out) as work:
        _fill(network, config, tokenizer, work)


def _fill(network: Network, config: dict[str, Any], tokenizer: Path, out: Path) -> None:
    tensors = {
        name: part.detach().to("cpu", torch.bfloat16).contiguous()
        for name, part in stored_tensors(network.decoder)
    }
    shards = _shards(tensors)
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in shard}, out / file, metadata={"format": "pt"})
        names |= dict.fromkeys(shard, file)
    total = sum(_bytes(tensor) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_TEXT,
        "eos_token": END_TEXT,
        "model_max_length": config["max_position_embeddings"],
    }
    for name, value in (
        (INDEX_FILE, index),
        ("config.json", config),
        ("tokenizer_config.json", settings),
    ):
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer, out / "tokenizer.json")


def _shards(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Names in order, as many in a shard as fit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + _bytes(tensor) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(tensor)
    return shards


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
