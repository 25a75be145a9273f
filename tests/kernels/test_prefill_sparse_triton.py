"""Sparse prefill's Triton kernels under their interpreter against the specification."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import prefill_sparse, reference
from kernels.block_age import AGE_RANGES
from kernels.cuda_prefill import BlockLists
from kernels.paged_kv import quantise_index_keys
from kernels.prefill_tiles import PrefillTiles
from tests.kernels.paged_case import random_tensor
from tests.kernels.span_case import SpanCase
from tests.kernels.test_indexer import masses

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a GPU host the kernels run compiled: see tests/gpu", allow_module_level=True)

from kernels.device_sparse_prefill import attend_lists, choose_lists, score_tiles


def check_lists(lists: BlockLists, mask_ZHB: Tensor) -> None:
    """The blocks of a mask, in order; what stands behind them does not matter."""
    want = BlockLists.of_mask(mask_ZHB)
    assert torch.equal(lists.counts, want.counts)
    past_ZHB = torch.arange(mask_ZHB.shape[2]) >= want.counts.unsqueeze(-1)
    assert torch.equal(lists.blocks.masked_fill(past_ZHB, 0), want.blocks.masked_fill(past_ZHB, 0))


SPANS = {
    "one-token": [(1, 1)],
    "whole": [(200, 200)],
    "ragged": [(17, 8), (129, 129), (190, 37)],
}


@pytest.mark.parametrize("spans", SPANS.values(), ids=list(SPANS))
def test_scores_lists_and_attention(spans: list[tuple[int, int]]) -> None:
    case = SpanCase.make(spans)
    tiles = PrefillTiles.of_spans(case.starts.tolist(), case.pages.lens_S.tolist())
    tables_SB = case.pages.tables_SB
    keys = random_tensor(case.pages.index_cache.shape[0], 2, 16, 16, seed=5)
    keys = keys.where(case.pages.index_cache[:, :1, :, :1].isfinite(), torch.nan)
    qi_THI = random_tensor(len(case.q_THD), 2, 16, seed=7)
    arguments = (qi_THI, torch.tensor([1, 0]), keys, tables_SB, tiles)
    shares = score_tiles(*arguments)
    torch.testing.assert_close(shares, reference.score_tiles(*arguments), rtol=1e-5, atol=1e-5)
    steps, scales = quantise_index_keys(keys.flatten(0, 1))
    steps = steps.view(keys.shape).masked_fill(keys.isnan(), 127)
    rounded = (*arguments[:2], steps, tables_SB, tiles, scales.view(keys.shape[:3]))
    torch.testing.assert_close(
        score_tiles(*rounded), reference.score_tiles(*rounded), rtol=1e-5, atol=1e-5
    )
    lens = case.pages.lens_S
    rule = (torch.tensor([0.2, 0.6]), tiles, lens, 0, 16)
    mask_ZHB = reference.select_tiles(shares, *rule)
    lists = choose_lists(shares, *rule)
    check_lists(lists, mask_ZHB)
    out_THD = case.poisoned()
    attend_lists(None, case.inputs(out_THD), tiles, lists, 0.25)
    q_TGD, kv_row_G, *caches, _, _ = case.twin_arguments
    k_cache, v_cache, _ = caches
    case.check_heads(
        out_THD,
        reference.prefill_sparse(
            q_TGD, kv_row_G, k_cache, v_cache, tables_SB, tiles, mask_ZHB, 0.25
        ),
    )


@pytest.mark.parametrize("scaled", [False, True], ids=["f32", "int8"])
def test_scores_with_a_bias_by_age(scaled: bool) -> None:
    """Two runs of blocks that all queries see and ends that some do; ages of eight ranges."""
    spans = [(16 * 70 + 5, 20), (60, 37)]
    case = SpanCase.make(spans)
    tiles = PrefillTiles.of_spans(case.starts.tolist(), case.pages.lens_S.tolist())
    tables_SB = case.pages.tables_SB
    keys = random_tensor(case.pages.index_cache.shape[0], 2, 16, 16, seed=5)
    scales = None
    if scaled:
        steps, scales = quantise_index_keys(keys.flatten(0, 1))
        keys, scales = steps.view(keys.shape), scales.view(keys.shape[:3])
    arguments = (random_tensor(len(case.q_THD), 1, 16, seed=7), torch.tensor([1]), keys)
    bias_HA = 3 * random_tensor(1, AGE_RANGES, seed=9)
    tail = (tables_SB, tiles, scales)
    shares = score_tiles(*arguments, *tail, bias_HA)
    want = prefill_sparse.score_tiles(*arguments, *tail, bias_HA)
    torch.testing.assert_close(shares, want, rtol=1e-5, atol=1e-5)


def test_a_bias_lifts_a_mass_however_small() -> None:
    """A bias counts before masses are compared: e^-100 of an older block's is nothing to a float,
    and with 200 nats more it is all there is."""
    case = SpanCase.make([(64, 64)])
    tiles = PrefillTiles.of_spans(case.starts.tolist(), case.pages.lens_S.tolist())
    keys = torch.zeros(case.pages.index_cache.shape[0], 2, 16, 16)
    keys[case.pages.tables_SB[0, 0], 0, :, 0] = 100.0  # the oldest block has e^100 times the mass
    bias_HA = torch.zeros(1, AGE_RANGES)
    bias_HA[0, 0] = 200.0
    given = (torch.ones(64, 1, 16), torch.tensor([0]), keys, case.pages.tables_SB, tiles)
    shares = score_tiles(*given, age_bias_HA=bias_HA)
    want = reference.score_tiles(*given, age_bias_HA=bias_HA)
    torch.testing.assert_close(shares, want, rtol=1e-5, atol=1e-4)
    none = score_tiles(*given, age_bias_HA=torch.zeros_like(bias_HA))
    assert torch.equal(none, score_tiles(*given))


@settings(deadline=None, max_examples=8)
@given(masses(), st.integers(0, 40), st.integers(0, 60))
def test_lists_equal_the_specification(
    case: tuple[Tensor, Tensor, Tensor], dense_from: int, dense_below: int
) -> None:
    """Equal shares, outliers and ends of contexts; a tile of each context length."""
    shares, top_p, lens = case
    tiles = PrefillTiles.of_spans(range(len(lens) + 1), lens.tolist())
    rule = (top_p[0], tiles, torch.full((len(lens),), dense_from), dense_below, 8)
    check_lists(choose_lists(shares, *rule), prefill_sparse.select_tiles(shares, *rule))


def test_lists_of_many_blocks() -> None:
    """More than are looked at together, shares that spread over all bins, and a share of 1."""
    shares = 12 * random_tensor(2, 3, 1111)
    tiles = PrefillTiles.of_spans([0, 1, 2], [1111 * 16 - 3, 900 * 16])
    rule = (torch.tensor([0.3, 0.95, 1.0]), tiles, torch.tensor([99999, 99999]), 0, 16)
    check_lists(choose_lists(shares, *rule), prefill_sparse.select_tiles(shares, *rule))
