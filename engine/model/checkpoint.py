"""Pre-flight of a model folder: everything that can be wrong is found before memory is taken.

Torch-free, so that the front end checks a folder in milliseconds and names the file at fault.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError
from engine.model.config import ModelConfig
from engine.model.config_reader import read_config
from engine.model.head_layout import model_heads
from engine.model.json_object import read_json_object, shown
from engine.model.safetensors_header import StoredTensor, read_header
from engine.model.weight_names import is_ignored, weight_rules

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
INDEXER_FILE = "indexer.safetensors"
FLOAT_DTYPES = ("F32", "BF16", "F16")
AGE_BIAS = "age_bias"  # stored in float32, whatever the dtype of the weights
AGE_RANGES = 16  # as `kernels.block_age`, which needs torch
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that passed: its description and where each stored tensor lies."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]  # stored name -> place; the model's own
    indexer: Mapping[str, StoredTensor]  # the same for indexer.safetensors; empty without indexer

    @property
    def weight_bytes(self) -> int:
        """Bytes on disk of everything that is loaded."""
        return sum(tensor.num_bytes for tensor in self._loaded())

    @property
    def weight_count(self) -> int:
        """Numbers in everything that is loaded."""
        return sum(tensor.count for tensor in self._loaded())

    def _loaded(self) -> tuple[StoredTensor, ...]:
        return (*self.tensors.values(), *self.indexer.values())


def preflight(folder: Path) -> Checkpoint:
    """Check a folder without loading it.

    Raises:
        CheckpointError: one line that names the file.
    """
    if not os.access(folder, os.F_OK) or not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, or this user may not reach it")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise CheckpointError(f"{folder}: this user may not read the folder")
    config = read_config(folder)
    read_json_object(folder / "tokenizer.json")
    tensors = _model_tensors(folder)
    _check_model(folder, config, tensors)
    kept = {name: stored for name, stored in tensors.items() if not is_ignored(name, config)}
    return Checkpoint(folder, config, kept, _indexer_tensors(folder, config))


def indexer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Stored names and shapes of indexer.safetensors (design section 4); empty without indexer."""
    shapes: dict[str, tuple[int, ...]] = {}
    if config.sparse is None or config.sparse.index_dim is None:
        return shapes
    for layer, heads in enumerate(model_heads(config)):
        if heads.has_indexer:
            size = (config.sparse.index_dim, config.head_dim)
            prefix = f"model.layers.{layer}.self_attn.indexer."
            shapes[prefix + "q_proj.weight"] = (len(heads.retrieval), *size)
            shapes[prefix + "k_proj.weight"] = (heads.index_rows, *size)
            if config.sparse.index_age_bias:
                shapes[prefix + AGE_BIAS] = (len(heads.retrieval), AGE_RANGES)
    return shapes


def _model_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Tensors of the single file or else of the shards, in the order that transformers looks."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        return read_header(single)
    if index.exists():
        return _sharded(index)
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLE_SUFFIXES:
            raise CheckpointError(f"{path}: pickled weights are not loaded; convert to safetensors")
    raise CheckpointError(f"{single}: no such file")


def _sharded(index: Path) -> dict[str, StoredTensor]:
    """Tensors of all shards; the index and the shards must agree exactly."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted({str(name) for name in weight_map.values()}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard {shown(shard)} is no safetensors file beside it")
        for name, stored in read_header(index.parent / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{stored.file}: tensor {shown(name)} is not listed in {index.name}"
                )
            tensors[name] = stored
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index.parent / shard}: tensor {shown(name)} is missing")
    return tensors


def _check_model(folder: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> None:
    file = folder / (SINGLE_FILE if (folder / SINGLE_FILE).exists() else INDEX_FILE)
    known: set[str] = set()
    for rule in weight_rules(config):
        for name, shape in rule.sources:
            _check(file, name, shape, tensors)
            known.add(name)
    for name, stored in tensors.items():
        if name not in known and not is_ignored(name, config):
            raise CheckpointError(
                f"{stored.file}: tensor {shown(name)} is not part of such a model"
            )


def _indexer_tensors(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    expected = indexer_shapes(config)
    path = folder / INDEXER_FILE
    if not expected and not path.exists():
        return {}
    tensors = read_header(path)
    for name, shape in expected.items():
        dtypes = ("F32",) if name.endswith(AGE_BIAS) else FLOAT_DTYPES
        _check(path, name, shape, tensors, dtypes)
    if surplus := sorted(set(tensors) - set(expected)):
        biased = config.sparse is not None and config.sparse.index_age_bias
        unnamed = surplus[0].endswith(AGE_BIAS) and not biased
        raise CheckpointError(
            f"{path}: tensor {shown(surplus[0])} "
            + (
                "is there, but config.json has no rtpurbo.index_age_bias: true"
                if unnamed
                else "belongs to no retrieval head with an indexer"
            )
        )
    return tensors


def _check(
    file: Path,
    name: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, StoredTensor],
    dtypes: tuple[str, ...] = FLOAT_DTYPES,
) -> None:
    """One expected tensor; `file` is named where it is missing."""
    stored = tensors.get(name)
    if stored is None:
        raise CheckpointError(f"{file}: tensor {name!r} is missing")
    if stored.shape != shape:
        raise CheckpointError(
            f"{stored.file}: tensor {name!r} has shape {shown(list(stored.shape))}, "
            f"not {list(shape)}"
        )
    if stored.dtype not in dtypes:
        wanted = dtypes[0] if len(dtypes) == 1 else f"one of {', '.join(dtypes)}"
        raise CheckpointError(
            f"{stored.file}: tensor {name!r} has dtype {stored.dtype}, not {wanted}"
        )
