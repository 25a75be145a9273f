"""A strict reader of safetensors headers: what a file claims to hold, checked against its size.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes.
Nothing is mapped or allocated besides the header. Torch-free.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
}
ITEM_BYTES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library
_LFS_MARK = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: safetensors dtype name, shape, and bytes on disk."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one file by name.

    Raises:
        CheckpointError: one line; truncated file, Git-LFS pointer, malformed or lying header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if _LFS_MARK.startswith(start) and len(start) == 8:
                raise CheckpointError(
                    f"{path}: a Git-LFS pointer, not the weights; run git lfs pull"
                )
            if len(start) < 8:
                raise CheckpointError(f"{path}: truncated, {size} bytes hold no safetensors header")
            (length,) = struct.unpack("<Q", start)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: not a safetensors file (header of {length} bytes)")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or 'not readable'}") from None
    if len(header) < length:
        raise CheckpointError(f"{path}: truncated inside its header")
    return _tensors(path, _parse(path, header), size - 8 - length)


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name stands twice")
        return names

    try:
        value = json.loads(header, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: its safetensors header is not valid JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: its safetensors header is not an object")
    value.pop("__metadata__", None)
    return value


def _tensors(path: Path, entries: dict[str, Any], data_bytes: int) -> dict[str, StoredTensor]:
    tensors = {}
    spans = []
    for name, entry in entries.items():
        tensor, begin = _tensor(path, name, entry)
        tensors[name] = tensor
        spans.append((begin, begin + tensor.num_bytes))
    expected = 0
    for begin, end in sorted(spans):
        if begin != expected:
            raise CheckpointError(f"{path}: tensors overlap or leave a gap at byte {expected}")
        expected = end
    if expected > data_bytes:
        raise CheckpointError(
            f"{path}: truncated, {data_bytes} of {expected} tensor bytes are there"
        )
    if expected < data_bytes:
        raise CheckpointError(f"{path}: {data_bytes - expected} bytes follow the last tensor")
    return tensors


def _tensor(path: Path, name: str, entry: Any) -> tuple[StoredTensor, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sane = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sane = False
    if not sane or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: tensor {name[:100]!r} has a malformed entry")
    if end - begin != prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(f"{path}: tensor {name[:100]!r} has a size that is not its shape's")
    return StoredTensor(path, dtype, tuple(shape), end - begin), begin
