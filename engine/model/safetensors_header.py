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
from typing import Any, BinaryIO, TypeGuard

from engine.errors import CheckpointError
from engine.model.json_object import LFS_MARK, shown

# Every whole-byte dtype of the format, so that a wrong one is named rather than called malformed.
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library
MAX_DIMENSIONS = 64  # the limit of torch; the product of a million of them would take hours


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file and where its bytes lie."""

    file: Path
    dtype: str  # name in the format: F32, BF16, ...
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int

    @property
    def count(self) -> int:
        """Numbers in it."""
        return prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one file by name.

    Raises:
        CheckpointError: one line; truncated file, Git-LFS pointer, malformed or lying header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = _read_header_bytes(path, file, size)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or 'not readable'}") from None
    return _tensors(path, _parse(path, header), data_start=8 + len(header), file_bytes=size)


def _read_header_bytes(path: Path, file: BinaryIO, size: int) -> bytes:
    start = file.read(len(LFS_MARK))
    if start == LFS_MARK.encode():
        raise CheckpointError(f"{path}: a Git-LFS pointer, not the weights; run git lfs pull")
    if len(start) < 8:
        raise CheckpointError(f"{path}: truncated, {size} bytes hold no safetensors header")
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: not a safetensors file (header of {length} bytes)")
    if 8 + length > size:
        raise CheckpointError(f"{path}: truncated inside its header")
    file.seek(8)
    return file.read(length)


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


def _tensors(
    path: Path, entries: dict[str, Any], data_start: int, file_bytes: int
) -> dict[str, StoredTensor]:
    """The entries, which must cover the rest of the file without gap or overlap."""
    tensors = {name: _tensor(path, name, entry, data_start) for name, entry in entries.items()}
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end:
            raise CheckpointError(f"{path}: tensors overlap or leave a gap at byte {end}")
        end += tensor.num_bytes
    if end > file_bytes:
        raise CheckpointError(f"{path}: truncated, {file_bytes} of {end} bytes are there")
    if end < file_bytes:
        raise CheckpointError(f"{path}: {file_bytes - end} bytes follow the last tensor")
    return tensors


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (_whole_numbers(shape) and _whole_numbers(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{path}: tensor {shown(name)} has a malformed entry")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: tensor {shown(name)} has dtype {shown(dtype)}")
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{path}: tensor {shown(name)} has {len(shape)} dimensions")
    begin, end = offsets
    if end - begin != prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(f"{path}: tensor {shown(name)} has a size that is not its shape's")
    return StoredTensor(path, dtype, tuple(shape), data_start + begin, end - begin)


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
