"""Tries out `span_prefill`, attention of prompt tokens (compute capability 9.0), on three spans."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import cuda_prefill, prefill, prefill_sparse
from kernels._launch import KernelLibrary
from kernels.cuda_prefill import BlockLists
from kernels.prefill_tiles import PrefillTiles
from kernels.span_inputs import EVERYTHING, SpanInputs
from kernels.trial import check_close, random_numbers

SPANS = ((321, 1), (257, 130), (65, 65))  # context and query tokens
HEADS, SINKS = (2, 0), 4  # of a layer of three; their KV heads are the second and the first
WINDOW = 100


def try_spans(library: KernelLibrary, head_dim: int, device: torch.device) -> None:
    """With a window, without one, and with lists of blocks; the twins run on the CPU.

    Raises:
        TrialError: it gives something else than its twin.
        KernelError: a launch failed.
    """
    given = _inputs(head_dim)
    tiles = PrefillTiles.of_spans(given.query_starts.tolist(), given.context_lens_S.tolist())
    shares = random_numbers(torch.float32, seed=10)(tiles.count, 2, given.block_tables_SB.shape[1])
    rule = (torch.full((2,), 0.5), tiles, given.context_lens_S, 0, cuda_prefill.BLOCK)
    mask_ZGB = prefill_sparse.select_tiles(shares, *rule)
    scale = head_dim**-0.5

    def twin(dtype: torch.dtype, window: int | None) -> Tensor:
        pages = (given.k_cache.to(dtype), given.v_cache.to(dtype), given.block_tables_SB)
        queries = (given.q_THD[:, given.heads_G].to(dtype), given.kv_row_G, *pages)
        if window is None:
            return prefill_sparse.prefill_sparse(*queries, tiles, mask_ZGB, scale)
        spans = (given.query_starts, given.context_lens_S)
        return prefill.prefill_windowed(*queries, *spans, window, SINKS, scale)

    mask_there = BlockLists.of_mask(mask_ZGB)
    lists = BlockLists(mask_there.blocks.to(device), mask_there.counts.to(device))
    for window in (WINDOW, EVERYTHING, None):
        there = SpanInputs(*(part.to(device, copy=True) for part in given))
        rule_of = (EVERYTHING if window is None else window, SINKS, scale)
        cuda_prefill.attend_spans(library, there, *rule_of, lists if window is None else None)
        found = there.out_THD.cpu()
        exact, rounded = (twin(dtype, window) for dtype in (torch.float32, found.dtype))
        check_close("span_prefill", found[:, given.heads_G], exact, rounded)


def _inputs(head_dim: int) -> SpanInputs:
    """On the CPU; the output is NaN."""
    random, block = random_numbers(torch.bfloat16, seed=9), cuda_prefill.BLOCK
    lens_S = torch.tensor([context for context, _ in SPANS])
    starts = torch.tensor([0, *(queries for _, queries in SPANS)]).cumsum(0)
    shape = (len(SPANS), -(-int(lens_S.max()) // block))
    pages = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(9)) + 1
    q_THD = random(int(starts[-1]), 3, head_dim)
    k_cache, v_cache = (random(len(pages) + 1, 2, block, head_dim) for _ in "kv")
    heads = (q_THD, torch.full_like(q_THD, torch.nan), torch.tensor(HEADS), torch.tensor([1, 0]))
    return SpanInputs(*heads, k_cache, v_cache, pages.view(shape), starts, lens_S)
