"""On a GPU host: attention of decode divided in every way, by clusters and by CTAs.

python -m pytest tests/gpu/test_cuda_grids.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.decode_grids import grids
from kernels._args import FEW_ITEMS
from kernels._launch import KernelLibrary
from kernels.decode_grid import DecodeGrid
from tests.gpu.decode_shapes import DTYPES, PRODUCTION
from tests.kernels.layer_case import HEAD_MAPS, LayerCase, check_layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ROWS = {
    "one": [20001],
    "short": [65],
    "ragged": [1, 9000, 0],
    "eight": [700, 64, 65, 8192, 8197, 0, 1, 12000],
}


def grids_of(case: LayerCase, library: KernelLibrary) -> dict[str, DecodeGrid]:
    """All ways, and for clusters down to a block a piece, so that items have many."""
    plan = case.workspace(library).plan(case.tiles)
    found = grids(plan, len(case.lens_R), case.tiles.count)
    return found | {
        f"{name}, small pieces": replace(grid, least_blocks=3, least_listed=1)
        for name, grid in found.items()
        if grid.cluster and "window in 1" in name
    }


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("lens", ROWS.values(), ids=ROWS)
@DTYPES
def test_every_grid(
    library: KernelLibrary,
    dtype: torch.dtype,
    lens: list[int],
    dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(HEAD_MAPS, "production", PRODUCTION)
    shape = {"dtype": dtype, "dim": dim, "split_roles": True, "window": 8192, "top_p": 0.2}
    case = LayerCase.make(lens, "production", device="cuda", **shape)  # type: ignore[arg-type]
    assert case.tiles.count * len(lens) <= FEW_ITEMS
    for grid in grids_of(case, library).values():
        monkeypatch.setattr(DecodeGrid, "of", lambda *_, grid=grid, **__: grid)
        check_layer(case, library)
        workspace = case.workspace(library)
        first_RHD, _ = case.run(workspace)
        for _ in range(5):
            again_RHD, _ = case.run(workspace)
            assert torch.equal(again_RHD, first_RHD), grid
