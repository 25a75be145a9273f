"""Decode attention of few rows by clusters of CTAs, without a GPU, against the PyTorch ops.

What `test_cuda_decode` asks of layers of up to three rows runs in clusters too, as the plan has it;
here launches are divided otherwise, down to one block a piece.
"""

from __future__ import annotations

import pytest
import torch

from kernels._args import FEW_ITEMS, DecodePlan
from kernels._launch import KernelError, KernelLibrary
from kernels.decode_grid import DecodeGrid
from tests.kernels.emulation.library import compiler
from tests.kernels.layer_case import HEAD_MAPS, LayerCase
from tests.kernels.layer_check import check_layer

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")

# ctas, CTAs of a cluster, clusters for lists alone, blocks of a piece without and with a list.
GRIDS = {
    "sixteen": DecodeGrid(32, 16, 1, 3, 2),
    "eight": DecodeGrid(40, 8, 2, 1, 1),
    "four": DecodeGrid(24, 4, 0, 1, 3),
    "two": DecodeGrid(14, 2, 3, 2, 1),
    "more-for-lists": DecodeGrid(20, 4, 4, 1, 1),
    "alone": DecodeGrid(11, 0, 3, 2, 1),
    "alone, more-for-lists": DecodeGrid(7, 0, 6, 1, 1),
}
EACH_GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


@pytest.fixture(scope="module")
def library(emulated_kernels: KernelLibrary) -> KernelLibrary:
    return emulated_kernels


def divide(monkeypatch: pytest.MonkeyPatch, grid: DecodeGrid) -> None:
    """Launches are divided like this from here on."""
    monkeypatch.setattr(DecodeGrid, "of", lambda *_, **__: grid)


@needs_compiler
@EACH_GRID
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_every_grid(
    library: KernelLibrary, dtype: torch.dtype, grid: DecodeGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    divide(monkeypatch, grid)
    shape = {"dtype": dtype, "split_roles": True, "window": 500}
    check_layer(LayerCase.make([900], **shape), library)  # type: ignore[arg-type]
    check_layer(LayerCase.make([70, 0, 333], dim=128, block=16, **shape), library)  # type: ignore[arg-type]


@needs_compiler
@pytest.mark.parametrize("head_map", HEAD_MAPS)
def test_every_head_map(
    library: KernelLibrary, head_map: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    divide(monkeypatch, GRIDS["eight"])
    check_layer(LayerCase.make([17, 400], head_map, dtype=torch.bfloat16), library)


@needs_compiler
def test_more_pieces_than_clusters(library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    divide(monkeypatch, GRIDS["two"])
    lens = [1, 64, 65, 129, 400, 0, 900]
    case = LayerCase.make(lens, dtype=torch.bfloat16, split_roles=True, window=200)
    assert case.tiles.count * len(lens) > 32, "lanes have two items"
    check_layer(case, library)
    check_layer(LayerCase.make(lens, indexed=False), library)


@needs_compiler
@pytest.mark.parametrize("window", [0, 1, 64, 65, 10**6])
def test_windows(library: KernelLibrary, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    divide(monkeypatch, GRIDS["four"])
    check_layer(LayerCase.make([1, 200, 961], window=window), library)


@needs_compiler
def test_pieces_longer_than_a_warps_lanes(
    library: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane looks a strip up for its warp: 32 of them, then the next 32."""
    divide(monkeypatch, DecodeGrid(2, 2, 0, 2**20, 2**20))
    case = LayerCase.make([16 * 600 + 3], "one-head", dtype=torch.bfloat16, block=16, indexed=False)
    check_layer(case, library)


@needs_compiler
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "grid", [GRIDS["eight"], DecodeGrid(2, 2, 0, 1, 1)], ids=["eight", "one-for-all-pieces"]
)
def test_the_order_of_threads_does_not_matter(
    library: KernelLibrary, grid: DecodeGrid, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    divide(monkeypatch, grid)
    case = LayerCase.make([300, 64], dtype=torch.bfloat16, dim=128, split_roles=True, window=100)
    want, _ = case.run(case.workspace(library))
    # The emulation takes the stream's handle as the seed of its order.
    monkeypatch.setattr("kernels._launch.stream_of", lambda _: 1000 + seed)
    got, _ = case.run(case.workspace(library))
    assert torch.equal(got, want)


@needs_compiler
def test_many_items_are_not_for_clusters(
    library: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LayerCase.make([5] * 33, "all-retrieval")
    assert case.tiles.count * 33 > FEW_ITEMS
    divide(monkeypatch, GRIDS["four"])
    with pytest.raises(KernelError, match="sparse_decode"):
        case.run(case.workspace(library))


PLAN = DecodePlan(
    ctas=396, warps=4, shared_bytes=72_000, overlap=1, clusters_of_8=49, clusters_of_16=24
)


def test_few_rows_have_clusters() -> None:
    assert DecodeGrid.of(PLAN, 2, 8, 64, 512) == DecodeGrid(392, 8, 32, 144, 32)
    assert DecodeGrid.of(PLAN, 3, 16, 64, 512).held_back == 25, "24 tiles have windows"
    assert DecodeGrid.of(PLAN, 1, 8, 64, 0) == DecodeGrid(384, 16, 0, 144, 64)
    small = DecodePlan(ctas=60, clusters_of_8=7)
    assert DecodeGrid.of(small, 3, 8, 128, 512) == DecodeGrid(56, 8, 2, 72, 16)


def test_one_row_has_as_many_as_find_room_beside_its_selection() -> None:
    assert DecodeGrid.of(PLAN, 1, 8, 64, 1024) == DecodeGrid(224, 16, 9, 144, 64)
    assert DecodeGrid.of(PLAN, 1, 8, 64, 1025) == DecodeGrid(192, 8, 16, 144, 32)
    assert DecodeGrid.of(PLAN, 1, 16, 64, 1024).held_back == 6, "eight tiles have windows"
    tiny = DecodePlan(ctas=8, clusters_of_8=1)
    assert DecodeGrid.of(tiny, 1, 8, 64, 1024) == DecodeGrid(8, 8, 0, 144, 32)


def test_many_rows_and_many_tiles_have_none() -> None:
    assert DecodeGrid.of(PLAN, 4, 8, 64, 512) == DecodeGrid(396, 0, 211, 5, 2)
    assert DecodeGrid.of(PLAN, 3, 22, 64, 512) == DecodeGrid(396, 0, 132, 5, 2)
    without = DecodePlan(ctas=396)
    assert DecodeGrid.of(without, 1, 8, 64, 512) == DecodeGrid(396, 0, 132, 5, 2)
    assert DecodeGrid.of(without, 1, 8, 64, 0) == DecodeGrid(396, 0, 0, 5, 2)


@needs_compiler
def test_a_cluster_has_at_least_two_ctas(
    library: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is launched as none, and instructions for clusters are illegal there."""
    assert_refused(library, DecodeGrid(5, 1, 1, 1, 1), monkeypatch)


@needs_compiler
@pytest.mark.parametrize("cluster", [0, 2])
def test_somebody_is_left_for_items_without_lists(
    library: KernelLibrary, cluster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = 3
    ctas = workers * max(1, cluster)
    assert_refused(library, DecodeGrid(ctas, cluster, workers, 1, 1), monkeypatch)


def assert_refused(
    library: KernelLibrary, grid: DecodeGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    divide(monkeypatch, grid)
    case = LayerCase.make([300], dtype=torch.bfloat16, dim=128)
    with pytest.raises(KernelError, match="CUDA error 1"):
        case.run(case.workspace(library))
