"""Files of a conversion in progress: whole or not there, and readable where they can be."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from conversion.errors import ConversionError
from engine.model.checkpoint import Checkpoint
from engine.model.decoder import Indexer

SAMPLES, SAMPLE_BYTES = (
    16,
    2**20,
)  # of every weight file; reading all of a large model takes minutes


def model_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over config.json, and over the size and evenly spaced samples of each weight file."""
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for path in sorted({stored.file for stored in checkpoint.tensors.values()}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(sample * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """The value in a state file; raises ConversionError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConversionError(f"{path}: not readable; remove it to do this step again") from None


def write_json(path: Path, value: Any) -> None:
    """A state file that people can read; raises ConversionError."""
    _write(path, lambda file: file.write_text(_readable(value), encoding="utf-8"))


def _readable(value: Any) -> str:
    """JSON with a line for each key, so that a head list can be edited by hand."""
    if not isinstance(value, dict):
        return json.dumps(value, indent=1) + "\n"
    lines = [f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_tensors(path: Path, indexers: Sequence[Indexer | None]) -> None:
    """The indexers by layer; raises ConversionError."""
    tensors = indexer_tensors(indexers)
    _write(path, lambda file: save_file(tensors, file))


def read_tensors(path: Path, layers: int) -> list[Indexer | None]:
    """What `write_tensors` wrote; raises ConversionError."""
    try:
        tensors = load_file(path)
    except Exception:  # the library raises its own types
        raise ConversionError(f"{path}: not readable; remove {path.parent}") from None
    return tensor_indexers(tensors, layers)


def indexer_tensors(indexers: Sequence[Indexer | None]) -> dict[str, Tensor]:
    """By layer and part; biases for ages where there are any."""
    tensors = {}
    for layer, indexer in enumerate(indexers):
        if indexer is not None:
            tensors[f"{layer}.q"] = indexer.q_proj_HID.contiguous()
            tensors[f"{layer}.k"] = indexer.k_proj_HID.contiguous()
            if indexer.age_bias_HA is not None:
                tensors[f"{layer}.age"] = indexer.age_bias_HA.contiguous()
    return tensors


def tensor_indexers(tensors: Mapping[str, Tensor], layers: int) -> list[Indexer | None]:
    """What `indexer_tensors` was given."""
    return [
        Indexer(tensors[f"{layer}.q"], tensors[f"{layer}.k"], tensors.get(f"{layer}.age"))
        if f"{layer}.q" in tensors
        else None
        for layer in range(layers)
    ]


def write_snapshot(path: Path, tensors: Mapping[str, Tensor], about: Any) -> None:
    """Tensors and JSON in one file, replaced as a whole; raises ConversionError."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"about": json.dumps(about)}
    try:
        _write(path, lambda file: save_file(flat, file, metadata=metadata))
    except SafetensorError as error:  # no room on disk comes as the library's own type
        raise ConversionError(f"{path}: cannot be written ({error})".splitlines()[0]) from None


def read_snapshot(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What `write_snapshot` wrote; raises ConversionError."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["about"])
    except Exception:  # the library raises its own types
        raise ConversionError(f"{path}: not readable; remove {path.parent}") from None


def _write(path: Path, work: Callable[[Path], Any]) -> None:
    """Write beside and rename, so that a file is whole or not there."""
    part = path.with_name(path.name + ".part")
    try:
        work(part)
        os.replace(part, path)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be written ({error.strerror})") from None
