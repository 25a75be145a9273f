"""On a GPU host: the CUDA decode kernels against the PyTorch ops. Skips itself without CUDA.

    python -m pytest tests/gpu/test_cuda_decode.py

builds the kernels first (nvcc, some 10 s). Inputs are small and ugly, or of the size that the
kernels are made for: one layer of 32 query and 4 KV heads, head_dim 128, contexts up to 128K.
"""

from __future__ import annotations

import pytest
import torch

from kernels import indexer
from kernels._launch import KernelLibrary
from kernels.cuda_ops import CudaOps
from tests.gpu.decode_shapes import DTYPES, EDGES, PRODUCTION
from tests.kernels.layer_case import HEAD_MAPS, LayerCase
from tests.kernels.layer_check import check_layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"
SPLIT = pytest.mark.parametrize("split", [False, True], ids=["mixed-tiles", "split-tiles"])


@SPLIT
@pytest.mark.parametrize("head_map", HEAD_MAPS)
@DTYPES
def test_a_layer(library: KernelLibrary, dtype: torch.dtype, head_map: str, split: bool) -> None:
    case = LayerCase.make(EDGES, head_map, dtype=dtype, split_roles=split, device=DEVICE)
    check_layer(case, library)


@pytest.mark.parametrize("index_dim", [8, 16, 32])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("dim", [64, 128])
@DTYPES
def test_sizes(
    library: KernelLibrary, dtype: torch.dtype, dim: int, block: int, index_dim: int
) -> None:
    case = LayerCase.make(
        [1, 129, 260, 3000],
        dtype=dtype,
        dim=dim,
        block=block,
        index_dim=index_dim,
        top_p=0.3,
        device=DEVICE,
    )
    check_layer(case, library)


@pytest.mark.parametrize("index_dim", [8, 16, 32])
@pytest.mark.parametrize("block", [16, 64, 128])
@DTYPES
def test_int8_index_keys(
    library: KernelLibrary, dtype: torch.dtype, block: int, index_dim: int
) -> None:
    shape = {"block": block, "index_dim": index_dim, "dtype": dtype, "device": DEVICE}
    case = LayerCase.make(EDGES, top_p=0.3, int8_index=True, **shape)  # type: ignore[arg-type]
    check_layer(case, library)
    given = case.selection
    assert given is not None
    tail = (case.full.tables_RB, case.lens_R, given.index_scales)
    args = (given.index_row_S, given.index_cache, *tail)
    got = CudaOps(library).score_blocks(given.qi_RSI, *args)
    want = indexer.score_blocks(given.qi_RSI.float(), *args)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("int8_index", [False, True], ids=["own-index", "int8-index"])
@DTYPES
def test_a_bias_by_age(library: KernelLibrary, dtype: torch.dtype, int8_index: bool) -> None:
    """Ages up to the last range, which is open."""
    shape = {"block": 16, "index_dim": 8, "dtype": dtype, "device": DEVICE}
    lens = [*EDGES, 16 * 40000 + 5]
    case = LayerCase.make(lens, top_p=0.3, int8_index=int8_index, age_bias=True, **shape)  # type: ignore[arg-type]
    check_layer(case, library)
    given = case.selection
    assert given is not None
    keys = given.index_cache if int8_index else given.index_cache.float()
    tail = (case.full.tables_RB, case.lens_R, given.index_scales)
    ops, bias_SA = CudaOps(library), given.age_bias_SA
    got = ops.score_blocks(given.qi_RSI, given.index_row_S, given.index_cache, *tail, bias_SA)
    want = indexer.score_blocks(given.qi_RSI.float(), given.index_row_S, keys, *tail, bias_SA)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("int8_index", [False, True], ids=["bf16", "int8"])
def test_contexts_of_a_million_tokens_and_more(library: KernelLibrary, int8_index: bool) -> None:
    """More log masses than shared memory keeps; ten repeats are identical."""
    case = LayerCase.make(
        [2**20 + 70000, 2**20, 2**17 - 1],
        "one-head",
        dtype=torch.bfloat16,
        window=8192,
        int8_index=int8_index,
        device=DEVICE,
    )
    check_layer(case, library)
    workspace = case.workspace(library)
    first = case.run(workspace)
    for _ in range(9):
        torch.testing.assert_close(case.run(workspace), first, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("window", "sinks"), [(1, 0), (1, 4), (64, 0), (65, 64), (100, 1), (10**6, 4)]
)
@DTYPES
def test_windows(library: KernelLibrary, dtype: torch.dtype, window: int, sinks: int) -> None:
    case = LayerCase.make(EDGES, dtype=dtype, window=window, sinks=sinks, device=DEVICE)
    check_layer(case, library)


@DTYPES
def test_dense_padded_short_and_own_shares(library: KernelLibrary, dtype: torch.dtype) -> None:
    check_layer(LayerCase.make(EDGES, indexed=False, dtype=dtype, device=DEVICE), library)
    check_layer(LayerCase.make([0, 200, 0, 5], dtype=dtype, device=DEVICE), library)
    case = LayerCase.make([100, 255, 256, 257, 900], dense_below=256, dtype=dtype, device=DEVICE)
    own = torch.tensor([torch.nan, 0.05, 1.0, 0.2, 0.01], device=DEVICE)
    check_layer(case.with_selection(own_top_p_R=own), library)


@pytest.mark.parametrize(
    "lens",
    [[32768], [131071], [131072, 5, 8191, 8192, 8193, 70000, 8260, 40000], [1] * 300],
    ids=["1x32K", "1x128K", "8-ragged", "300-short"],
)
@SPLIT
@pytest.mark.parametrize("int8_index", [False, True], ids=["own-index", "int8-index"])
@DTYPES
def test_production_shapes(
    library: KernelLibrary,
    dtype: torch.dtype,
    int8_index: bool,
    split: bool,
    lens: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(HEAD_MAPS, "production", PRODUCTION)
    case = LayerCase.make(
        lens,
        "production",
        dtype=dtype,
        dim=128,
        window=8192,
        top_p=0.2,
        split_roles=split,
        int8_index=int8_index,
        device=DEVICE,
    )
    check_layer(case, library)


@DTYPES
def test_scores_equal_the_twins(library: KernelLibrary, dtype: torch.dtype) -> None:
    case = LayerCase.make([1, 64, 65, 40000], "all-retrieval", dtype=dtype, device=DEVICE)
    given = case.selection
    assert given is not None
    tail = (case.full.tables_RB, case.lens_R)
    got = CudaOps(library).score_blocks(given.qi_RSI, given.index_row_S, given.index_cache, *tail)
    want = indexer.score_blocks(
        given.qi_RSI.float(), given.index_row_S, given.index_cache.float(), *tail
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("blocks", [1, 2, 255, 257, 2048, 16384, 65535])
def test_selection_equals_the_twins_bit_for_bit(
    library: KernelLibrary, blocks: int, spread: float
) -> None:
    generator = torch.Generator(DEVICE).manual_seed(blocks)
    log_mass = spread * torch.randn(2, 4, blocks, generator=generator, device=DEVICE)
    log_mass[1, 0, blocks // 2] = torch.nan
    log_mass[1, 1] = -torch.inf
    top_p = torch.tensor([[0.01, 0.5, 0.9, 1.0], [0.9, 0.9, 0.999, 0.3]], device=DEVICE)
    lens = torch.tensor([blocks * 64, max(1, blocks * 64 - 100)], device=DEVICE)
    args = (log_mass, top_p, lens, 64)
    assert torch.equal(CudaOps(library).select_blocks(*args), indexer.select_blocks(*args))


@SPLIT
@DTYPES
def test_ten_repeats_give_the_same_bits(
    library: KernelLibrary, dtype: torch.dtype, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HEAD_MAPS, "production", PRODUCTION)
    case = LayerCase.make(
        [60000, 31, 9000],
        "production",
        dtype=dtype,
        dim=128,
        window=8192,
        split_roles=split,
        device=DEVICE,
    )
    workspace = case.workspace(library)
    out_RHD, attended_RS = case.run(workspace)
    assert attended_RS is not None
    for _ in range(9):
        again_RHD, counted_RS = case.run(workspace)
        assert torch.equal(again_RHD, out_RHD)
        assert counted_RS is not None
        assert torch.equal(counted_RS, attended_RS)


@SPLIT
def test_a_graph_replays_with_other_contents(library: KernelLibrary, split: bool) -> None:
    """Context lengths, pages, keys and queries change under the graph; the launches do not."""
    shape = {"dtype": torch.bfloat16, "dim": 128, "window": 1000, "device": DEVICE}
    shape["split_roles"] = split
    longest = 20000
    first = LayerCase.make([longest, 300, 1], seed=1, **shape)  # type: ignore[arg-type]
    workspace = first.workspace(library)
    first.run(workspace)  # what is made on first use is not made while a graph is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_RHD, attended_RS = first.run(workspace)
    for seed, lens in enumerate(([longest, 300, 1], [longest, 1, 5000], [longest, 0, 19999])):
        other = LayerCase.make(lens, seed=seed + 5, **shape)  # type: ignore[arg-type]
        assert first.selection is not None
        assert other.selection is not None
        pairs = [
            (first.q_RHD, other.q_RHD),
            (first.lens_R, other.lens_R),
            (first.selection.qi_RSI, other.selection.qi_RSI),
            (first.selection.index_row_S, other.selection.index_row_S),
            (first.selection.index_cache, other.selection.index_cache),
        ]
        for pool, its in ((first.full, other.full), (first.window, other.window)):
            pairs += [
                (pool.k_cache, its.k_cache),
                (pool.v_cache, its.v_cache),
                (pool.tables_RB, its.tables_RB),
            ]
        for mine, its_own in pairs:
            mine.copy_(its_own)
        graph.replay()
        want_RHD, want_RS = other.run(other.workspace(library))
        assert torch.equal(out_RHD, want_RHD)
        assert attended_RS is not None
        assert want_RS is not None
        assert torch.equal(attended_RS, want_RS)
        check_layer(other, library)
