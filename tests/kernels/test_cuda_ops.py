"""The ops of `CudaOps`, one at a time, against the specification: the kernels' sources on the CPU.

What an emulation cannot show (speed, interleaving of CTAs, the compiler's code) `tests/gpu` does.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kernels import indexer, reference
from kernels._launch import KernelLibrary
from kernels.block_age import AGE_RANGES
from kernels.cuda_ops import CudaOps
from tests.kernels.emulation.library import compiler
from tests.kernels.layer_case import LayerCase
from tests.kernels.paged_case import PagedCase, random_tensor
from tests.kernels.test_indexer import masses

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")


@pytest.fixture(scope="module")
def library(emulated_kernels: KernelLibrary) -> KernelLibrary:
    return emulated_kernels


@pytest.mark.parametrize("index_dim", [8, 16, 32])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_score_blocks(
    library: KernelLibrary, dtype: torch.dtype, block: int, index_dim: int
) -> None:
    case = PagedCase.make([1, 63, 64, 65, 300], block=block, index_dim=index_dim, dim=1)
    cache, rows = case.index_cache.to(dtype), torch.tensor([2, 0, 1, 1])
    qi = random_tensor(5, 4, index_dim).to(dtype)
    tail = (case.tables_SB, case.lens_S)
    got = CudaOps(library).score_blocks(qi, rows, cache, *tail)
    # Values of bfloat16 in float32: only the order of the sums differs.
    want = reference.score_blocks(qi.float(), rows, cache.float(), *tail)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index_dim", [8, 16, 32])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_score_blocks_by_int8_keys(
    library: KernelLibrary, dtype: torch.dtype, block: int, index_dim: int
) -> None:
    case = PagedCase.make([1, 63, 64, 65, 300], block=block, index_dim=index_dim, dim=1)
    steps, scales = case.int8_index()
    rows, qi = torch.tensor([2, 0, 1, 1]), random_tensor(5, 4, index_dim).to(dtype)
    tail = (rows, steps, case.tables_SB, case.lens_S, scales)
    got = CudaOps(library).score_blocks(qi, *tail)
    torch.testing.assert_close(got, reference.score_blocks(qi.float(), *tail), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_int8_keys_take_queries_of_any_size(library: KernelLibrary, dtype: torch.dtype) -> None:
    """The kernel multiplies digits of the query: sizes apart, zeros, the smallest, no numbers."""
    case = PagedCase.make([300], block=64, index_dim=16, dim=1)
    steps, scales = case.int8_index()
    factors = torch.tensor([1e-35, 1e-9, 1.0, 3000.0, 0.0])
    qi = random_tensor(1, 8, 16) * torch.cat((factors, torch.ones(3)))[:, None]
    qi[0, 5] *= 10.0 ** -torch.arange(16)  # from 1 to 1e-15
    qi[0, 6, 3], qi[0, 7, 9] = torch.nan, -torch.inf
    qi, rows = qi.to(dtype), torch.tensor([2, 0, 1, 1, 0, 2, 0, 1])
    tail = (rows, steps, case.tables_SB, case.lens_S, scales)
    got = CudaOps(library).score_blocks(qi, *tail)
    want = reference.score_blocks(qi.float(), *tail)
    torch.testing.assert_close(got[:, :6], want[:, :6], rtol=1e-5, atol=1e-5)
    used = -(-300 // 64)
    assert got[:, 6:, :used].isnan().all(), "and then only what is forced is selected"


@pytest.mark.parametrize(
    ("int8_index", "rows", "blocks"),
    [(True, [2, 0], 300), (False, [1], 2**14 + 9)],
    ids=["int8", "every-range"],
)
def test_score_blocks_with_a_bias_by_age(
    library: KernelLibrary, int8_index: bool, rows: list[int], blocks: int
) -> None:
    """On pages that rows share; the longer context has ages of the open range too."""
    case = PagedCase.make([16 * 9], block=16, index_dim=8, dim=1)
    keys, scales = case.int8_index() if int8_index else (case.index_cache, None)
    qi, bias = random_tensor(4, len(rows), 8), 3 * random_tensor(len(rows), AGE_RANGES)
    tables, lens = case.tables_SB[:, :9].repeat(4, 1822), torch.tensor([1, 16, 17, 16 * blocks - 3])
    tail = (torch.tensor(rows), keys, tables, lens, scales)
    got = CudaOps(library).score_blocks(qi, *tail, bias)
    torch.testing.assert_close(got, indexer.score_blocks(qi, *tail, bias), rtol=1e-5, atol=1e-5)
    plain = CudaOps(library).score_blocks(qi, *tail)
    none = CudaOps(library).score_blocks(qi, *tail, torch.zeros_like(bias))
    assert torch.equal(none, plain)


@pytest.mark.parametrize(
    "bias",
    [torch.zeros(1, 16), torch.zeros(2, 15), torch.zeros(2, 16).double(), torch.zeros(16, 2).T],
    ids=["heads", "ranges", "float64", "strided"],
)
def test_biases_of_another_layout_are_refused(library: KernelLibrary, bias: Tensor) -> None:
    case = PagedCase.make([70], block=16, index_dim=8, dim=1)
    tail = (torch.tensor([2, 0]), case.index_cache, case.tables_SB, case.lens_S, None)
    with pytest.raises(ValueError, match="age_bias"):
        CudaOps(library).score_blocks(random_tensor(1, 2, 8), *tail, bias)


def test_score_blocks_takes_queries_that_are_not_contiguous(library: KernelLibrary) -> None:
    case = PagedCase.make([70, 9], block=16, index_dim=16, dim=1)
    qi = random_tensor(3, 2, 17).transpose(0, 1)[..., 1:]
    args = (qi, torch.tensor([0, 2, 1]), case.index_cache, case.tables_SB, case.lens_S)
    got = CudaOps(library).score_blocks(*args)
    torch.testing.assert_close(got, reference.score_blocks(*args), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(masses())
def test_selection_equals_the_specification_bit_for_bit(
    library: KernelLibrary, case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    log_mass, top_p, lens = case
    got = CudaOps(library).select_blocks(log_mass, top_p, lens, 8)
    assert torch.equal(got, indexer.select_blocks(log_mass, top_p, lens, 8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", [slice(3, 4), slice(None)], ids=["one-block", "all-blocks"])
def test_values_that_are_not_finite_have_no_mass(
    library: KernelLibrary, bad: float, where: slice
) -> None:
    log_mass = random_tensor(2, 3, 9)
    log_mass[0, :, where] = bad
    args = (log_mass, torch.full((2, 3), 0.4), torch.tensor([72, 72]), 8)
    got = CudaOps(library).select_blocks(*args)
    assert torch.equal(got, reference.select_blocks(*args))


def test_selection_among_many_blocks(library: KernelLibrary) -> None:
    """More blocks than threads, words and bins, and than are kept; equal masses; a share of 1."""
    log_mass = 3 * random_tensor(2, 2, 2222)
    log_mass[1] = 1.0
    top_p = torch.tensor([[0.3, 0.9], [0.5, 1.0]])
    args = (log_mass, top_p, torch.tensor([2222 * 64 - 3, 900 * 64]), 64)
    assert torch.equal(CudaOps(library).select_blocks(*args), indexer.select_blocks(*args))


def test_a_mask_may_be_empty_for_some_heads(library: KernelLibrary) -> None:
    case = LayerCase.make([200, 300], "all-retrieval")
    mask = torch.zeros(2, 4, case.full.tables_RB.shape[1], dtype=torch.bool)
    mask[0, 1, 2] = True
    rows = torch.tensor([role.kv_row for role in case.roles])
    pool = (case.full.k_cache, case.full.v_cache, case.full.tables_RB, case.lens_R)
    args = (case.q_RHD, rows, *pool, mask, case.scale)
    got = CudaOps(library).decode_sparse(*args)
    torch.testing.assert_close(got, reference.decode_sparse(*args), rtol=1e-4, atol=2e-6)


def test_tables_of_int32_and_rows_that_share_one(library: KernelLibrary) -> None:
    """Replayed tokens are rows of one sequence; their table is one row, expanded."""
    case = LayerCase.make([300])
    pool = (case.full.k_cache, case.full.v_cache)
    table = case.full.tables_RB.to(torch.int32).expand(4, -1)
    lens, q = torch.tensor([297, 298, 299, 300]), random_tensor(4, 2, 64)
    got = CudaOps(library).decode_dense(q, torch.tensor([1, 0]), *pool, table, lens, 0.1)
    want = reference.decode_dense(q, torch.tensor([1, 0]), *pool, table.long(), lens, 0.1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6)
