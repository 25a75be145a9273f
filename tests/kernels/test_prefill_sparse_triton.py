"""Sparse prefill's Triton kernels under their interpreter against the specification."""

from __future__ import annotations

import os

import pytest
import torch

from kernels import reference
from kernels.paged_kv import quantise_index_keys
from kernels.prefill_tiles import PrefillTiles
from tests.kernels.paged_case import random_tensor
from tests.kernels.span_case import SpanCase

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a GPU host the kernels run compiled: see tests/gpu", allow_module_level=True)

from kernels.device_sparse_prefill import attend_lists, list_kept, score_tiles

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
    mask_ZHB = reference.select_tiles(shares, torch.tensor([0.2, 0.6]), tiles, lens, 0, 16)
    lists = list_kept(mask_ZHB)
    assert torch.equal(lists.counts.long(), mask_ZHB.sum(-1))
    for tile in range(tiles.count):
        for head in range(2):
            listed = lists.blocks[tile, head, : lists.counts[tile, head]].long()
            assert torch.equal(listed, mask_ZHB[tile, head].nonzero().squeeze(1))
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
