"""Headers that lie (V36, F14): a checkpoint error of one line, or tensors that tile the file."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointError
from engine.model.safetensors_header import ITEM_BYTES, StoredTensor, read_header
from tests.fuzzing import draws

HUGE = [-1, 0, 1, 2**31, 2**53, 2**63, 2**64 - 1, 10**400, True, 1.0, "1", None, [1]]


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "model.safetensors"


def read(file: Path, content: bytes) -> dict[str, StoredTensor] | None:
    """The tensors, which must tile the file; None for a refusal, which must be one short line."""
    file.write_bytes(content)
    refusal = None
    try:
        tensors = read_header(file)
    except CheckpointError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith(f"{file}: ")
        assert "\n" not in refusal
        assert len(refusal) < len(str(file)) + 300
        return None
    (length,) = struct.unpack("<Q", content[:8])
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.num_bytes)):
        assert tensor.offset == end
        assert tensor.num_bytes == prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        end += tensor.num_bytes
    assert end == len(content), "no byte is read that is not there, none is left over"
    return tensors


def packed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@st.composite
def honest(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """Entries of a file without a fault, and its data."""
    entries: dict[str, Any] = {}
    end = 0
    names = st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__")
    for name in draw(st.lists(names, unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return entries, bytes(end)


@draws(60)
@given(st.binary(max_size=200))
def test_v36_fuzz_arbitrary_bytes(file: Path, content: bytes) -> None:
    read(file, content)


@draws(60)
@given(honest())
def test_v36_fuzz_an_honest_file_is_read_whole(
    file: Path, written: tuple[dict[str, Any], bytes]
) -> None:
    entries, data = written
    tensors = read(file, packed(json.dumps(entries).encode(), data))
    assert tensors is not None
    assert {name: [tensor.dtype, list(tensor.shape)] for name, tensor in tensors.items()} == {
        name: [entry["dtype"], entry["shape"]] for name, entry in entries.items()
    }


@draws(90)
@given(honest(), st.data())
def test_v36_fuzz_a_header_that_lies(
    file: Path, written: tuple[dict[str, Any], bytes], data: st.DataObject
) -> None:
    """One field of one entry is another value: never a tensor whose size is not its shape's."""
    entries, content = written
    for name in data.draw(st.lists(st.sampled_from(sorted(entries) or [""]), max_size=3)):
        entry = entries.get(name)
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "data_offsets"]))
        value = data.draw(
            st.one_of(
                st.sampled_from([*HUGE, "F32", "I64", {}]),
                st.lists(st.sampled_from(HUGE), max_size=4),
                st.lists(st.integers(0, 40), min_size=2, max_size=2),
            )
        )
        changed = {**entry, field: value} if isinstance(entry, dict) else value
        entries[name] = data.draw(st.sampled_from([changed, changed, value]))
    grown = data.draw(st.sampled_from([b"", b"", b"x", bytes(8)]))
    read(file, packed(json.dumps(entries).encode(), content + grown))


@draws(60)
@given(honest(), st.integers(0, 2**64 - 1) | st.sampled_from([2**63, 2**64 - 1, 100 * 2**20]))
def test_v36_fuzz_a_header_length_that_lies(
    file: Path, written: tuple[dict[str, Any], bytes], length: int
) -> None:
    entries, data = written
    header = json.dumps(entries).encode()
    read(file, struct.pack("<Q", length) + header + data)


@draws(60)
@given(honest(), st.data())
def test_f14_fuzz_a_file_cut_anywhere_is_refused(
    file: Path, written: tuple[dict[str, Any], bytes], data: st.DataObject
) -> None:
    entries, content = written
    whole = packed(json.dumps(entries).encode(), content)
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert read(file, whole[:cut]) is None


def test_v36_a_shape_of_many_dimensions_is_refused_before_it_is_multiplied(file: Path) -> None:
    """The product of a million large numbers alone would keep the start busy for hours."""
    shape = [2**62] * 200_000
    entries = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    file.write_bytes(packed(json.dumps(entries).encode(), bytes(4)))
    with pytest.raises(CheckpointError, match="has 200000 dimensions"):
        read_header(file)
