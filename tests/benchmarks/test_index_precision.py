"""Rounded index keys: what each format may be off by, and that the benchmark counts as it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.index_precision import ROUNDINGS, measure
from engine.model.weights import load_decoder
from tests.engine.tiny_checkpoint import TinyModel, write_checkpoint


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("float32", 0.0),
        ("bfloat16", 2**-8),
        ("int8_per_token", 0.5 / 127 + 2**-8),  # its scale is rounded too
        ("int8_per_block", 0.51 / 127),
        ("fp8_e4m3", 2**-4),
    ],
)
def test_keys_are_off_by_no_more_than_their_format_allows(name: str, most: float) -> None:
    keys_TI = torch.randn(150, 16, generator=torch.Generator().manual_seed(0))
    keys_TI[40] = 0.0
    keys_TI[70] *= 30
    off_T = (ROUNDINGS[name](keys_TI, 64) - keys_TI).abs().amax(-1)
    largest_T = keys_TI.abs().amax(-1)
    if name == "int8_per_block":
        largest_T = torch.cat(
            [part.amax().expand(len(part)) for part in torch.split(largest_T, 64)]
        )
    assert bool((off_T <= most * largest_T).all())


def test_what_is_not_rounded_selects_itself(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", TinyModel())
    found = measure(load_decoder(folder, "cpu", torch.float32), [[7 + i % 40 for i in range(200)]])
    assert set(found) == set(ROUNDINGS)
    assert found["float32"]["overlap"] == 1.0
    for figures in found.values():
        assert 0 < figures["attention_kept"] <= 1
        assert 1 <= figures["blocks"] <= 200 / 8
        assert 0 < figures["overlap"] <= 1
