"""Weights that training has changed: a file of their own, then put into the shards of a model.

The file holds them under their checkpoint names and in the checkpoint's dtypes, so that putting
them in place is a copy of bytes. Whatever is written goes tensor by tensor, so memory holds one of
them and not the model.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from conversion.errors import ConversionError
from engine.model.checkpoint import Checkpoint
from engine.model.safetensors_header import ITEM_BYTES, StoredTensor, read_header
from engine.model.weight_names import weight_rules
from engine.model.weights import DTYPES, TensorReader

HEADER_ALIGNMENT = 8  # bytes; the format asks for it


def write_trained(
    path: Path, checkpoint: Checkpoint, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write weights by checkpoint name, atomically, in the order in which they come.

    Args:
        path: a safetensors file.
        checkpoint: gives each name its dtype and shape.
        tensors: any dtype and device; every weight of the checkpoint once, in `stored_order`.

    Raises:
        ConversionError: the file cannot be written.
    """
    order = stored_order(checkpoint)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(_header({name: checkpoint.tensors[name] for name in order}))
            for expected, (name, tensor) in zip(order, tensors, strict=True):
                assert name == expected
                file.write(_content(tensor, checkpoint.tensors[name]))
        os.replace(part, path)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be written ({error.strerror})") from None


def stored_order(checkpoint: Checkpoint) -> list[str]:
    """Names of all weights in the order of the decoder's parameters."""
    return [name for rule in weight_rules(checkpoint.config) for name, _ in rule.sources]


def write_shards(checkpoint: Checkpoint, trained: Path, folder: Path) -> None:
    """Copy the weight files of a model into `folder`, with the weights that `trained` holds.

    Files keep their names, sizes, dtypes and everything that was not trained. A head that is tied
    to the embedding and stored all the same follows it.

    Raises:
        CheckpointError: `trained` is unusable.
        ConversionError: it is of another model, or a file cannot be written.
    """
    changed = read_header(trained)
    for name, stored in changed.items():
        _check(trained, name, stored, checkpoint)
    with TensorReader(changed) as reader:
        for source in sorted({stored.file for stored in checkpoint.tensors.values()}):
            target = folder / source.name
            try:
                shutil.copyfile(source, target)
                with target.open("r+b") as file:
                    _overwrite(file, read_header(source), changed, checkpoint, reader)
            except OSError as error:
                raise ConversionError(f"{target}: cannot be written ({error.strerror})") from None


def _overwrite(
    file: BinaryIO,
    places: Mapping[str, StoredTensor],
    changed: Mapping[str, StoredTensor],
    checkpoint: Checkpoint,
    reader: TensorReader,
) -> None:
    """Put the trained tensors of one shard in place; its header stays as it is."""
    tied = checkpoint.config.tie_word_embeddings
    for name, place in places.items():
        source = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        if source in changed:
            file.seek(place.offset)
            file.write(_content(reader.read(source), place))


def _check(trained: Path, name: str, stored: StoredTensor, checkpoint: Checkpoint) -> None:
    expected = checkpoint.tensors.get(name)
    if expected is None or (expected.shape, expected.dtype) != (stored.shape, stored.dtype):
        raise ConversionError(f"{trained}: {name} is not of this model; remove it to train again")


def _header(tensors: Mapping[str, StoredTensor]) -> bytes:
    """The length and the JSON of a safetensors file that holds them in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, stored in tensors.items():
        span = [offset, offset + stored.num_bytes]
        entries[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": span}
        offset = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _content(tensor: Tensor, stored: StoredTensor) -> bytes:
    """The bytes of a tensor as it is stored."""
    assert tuple(tensor.shape) == stored.shape
    assert tensor.numel() * ITEM_BYTES[stored.dtype] == stored.num_bytes
    exact = tensor.detach().to("cpu", DTYPES[stored.dtype]).contiguous()
    return exact.flatten().view(torch.uint8).numpy().tobytes()
