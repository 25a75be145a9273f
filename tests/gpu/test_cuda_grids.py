"""On a GPU host: attention of decode divided in every way, by clusters and by CTAs.

python -m pytest tests/gpu/test_cuda_grids.py

One way a test, so that the first that fails is the one at fault: an illegal access or instruction
ends all work of the process on the device. `-k "clusters_of_8"` and the like runs some of them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.decode_grids import grids
from kernels._args import FEW_ITEMS, DecodePlan
from kernels._launch import KernelLibrary
from kernels.decode_grid import DecodeGrid
from tests.gpu.decode_shapes import DTYPES, PRODUCTION
from tests.kernels.layer_case import HEAD_MAPS, LayerCase
from tests.kernels.layer_check import check_layer

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
SMALL = ", small pieces"


def grids_of(plan: DecodePlan, rows: int, tiles: int, blocks: int) -> dict[str, DecodeGrid]:
    """All ways, and for clusters down to a block a piece, so that items have many."""
    found = grids(plan, rows, tiles, blocks)
    return found | {
        name + SMALL: replace(grid, least_blocks=3, least_listed=1)
        for name, grid in found.items()
        if grid.cluster and "window in 1" in name
    }


# Of a device that has all of them.
NAMES = list(grids_of(DecodePlan(ctas=396, clusters_of_8=49, clusters_of_16=24), 1, 1, 1))


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.replace(" ", "_"))
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("lens", ROWS.values(), ids=ROWS)
@DTYPES
def test_a_grid(
    library: KernelLibrary,
    dtype: torch.dtype,
    lens: list[int],
    dim: int,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(HEAD_MAPS, "production", PRODUCTION)
    shape = {"dtype": dtype, "dim": dim, "split_roles": True, "window": 8192, "top_p": 0.2}
    case = LayerCase.make(lens, "production", device="cuda", **shape)  # type: ignore[arg-type]
    assert case.tiles.count * len(lens) <= FEW_ITEMS
    plan = case.workspace(library).plan(case.tiles)
    width = case.full.tables_RB.shape[1]
    grid = grids_of(plan, len(lens), case.tiles.count, width).get(name)
    if grid is None:
        pytest.skip("this device has no clusters of that size")
    monkeypatch.setattr(DecodeGrid, "of", lambda *_, **__: grid)
    check_layer(case, library)
    workspace = case.workspace(library)
    first_RHD, _ = case.run(workspace)
    for _ in range(5):
        again_RHD, _ = case.run(workspace)
        assert torch.equal(again_RHD, first_RHD)
