"""On a GPU host: decode of a single row, whose blocks a cluster chooses. Skips itself without CUDA.

    python -m pytest tests/gpu/test_cuda_one_row.py

Held to the choice by shares, bit for bit, and as a whole layer to the PyTorch ops.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels._launch import KernelLibrary
from tests.gpu.decode_shapes import DTYPES, EDGES, PRODUCTION
from tests.kernels.cluster_case import by_clusters, check_choice, plan_of
from tests.kernels.layer_case import HEAD_MAPS, LayerCase
from tests.kernels.layer_check import check_layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"


def one_row(context: int, head_map: str, **shape: Any) -> LayerCase:
    return LayerCase.make([context], head_map, device=DEVICE, **shape)


@pytest.mark.parametrize("int8_index", [False, True], ids=["own-index", "int8-index"])
@pytest.mark.parametrize("context", [*EDGES, 32768, 32769, 70000, 131071])
@pytest.mark.parametrize("size", [8, 16])
@DTYPES
def test_a_cluster_chooses_what_shares_do(
    library: KernelLibrary,
    dtype: torch.dtype,
    size: int,
    context: int,
    int8_index: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five retrieval heads in two groups, bit for bit; lengths around the blocks of a CTA."""
    monkeypatch.setitem(HEAD_MAPS, "production", PRODUCTION)
    for split in (False, True):
        shape = {"dtype": dtype, "split_roles": split, "int8_index": int8_index, "top_p": 0.2}
        case = one_row(context, "production", **shape)
        check_choice(case, library, monkeypatch, size)


@pytest.mark.parametrize("index_dim", [8, 16, 32])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("head_map", ["mixed", "all-retrieval", "one-head", "twenty-on-one"])
@DTYPES
def test_sizes_of_one_row(
    library: KernelLibrary, dtype: torch.dtype, head_map: str, block: int, index_dim: int
) -> None:
    shape = {"dtype": dtype, "block": block, "index_dim": index_dim, "top_p": 0.3}
    check_layer(one_row(9001, head_map, **shape), library)


@pytest.mark.parametrize("int8_index", [False, True], ids=["own-index", "int8-index"])
@pytest.mark.parametrize("context", [1, 65, 2100])
@DTYPES
def test_a_layer_of_one_row(
    library: KernelLibrary, dtype: torch.dtype, context: int, int8_index: bool
) -> None:
    """Few, since they also run under checkers."""
    check_layer(one_row(context, "mixed", dtype=dtype, int8_index=int8_index), library)


@pytest.mark.parametrize("size", [8, 16])
def test_a_cluster_takes_the_longest_context(
    library: KernelLibrary, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """65,535 blocks; ten repeats are identical."""
    case = one_row(65535 * 16, "one-head", dtype=torch.bfloat16, block=16, dim=64)
    first = check_choice(narrowed(case, 65535), library, monkeypatch, size)
    for _ in range(9):
        again = by_clusters(narrowed(case, 65535), library, monkeypatch, size)
        for name, values in first.items():
            assert torch.equal(again[name], values), name


def narrowed(case: LayerCase, width: int) -> LayerCase:
    """With tables that are no wider than the context needs."""
    pools = [replace(p, tables_RB=p.tables_RB[:, :width]) for p in (case.full, case.window)]
    return replace(case, full=pools[0], window=pools[1])


def test_a_graph_of_one_row_replays_with_other_lengths(library: KernelLibrary) -> None:
    # The window pool keeps all pages: shorter contexts need those that the longest would not.
    shape = {"dtype": torch.bfloat16, "dim": 128, "window": 10**6, "dense_below": 100}
    case = one_row(20000, "mixed", **shape)
    assert plan_of(case, library).cluster(3, 1) > 0, "this device has clusters"
    workspace = case.workspace(library)
    case.run(workspace)  # what is made on first use is not made while a graph is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_RHD, attended_RS = case.run(workspace)
    assert attended_RS is not None
    for context in (20000, 64 * 32 * 16, 99, 0, 2048, 1):
        case.lens_R.fill_(min(context, 20000))
        graph.replay()
        want_RHD, want_RS = case.run(case.workspace(library))
        assert torch.equal(out_RHD, want_RHD)
        assert want_RS is not None
        assert torch.equal(attended_RS, want_RS)
