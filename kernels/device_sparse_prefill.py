"""Sparse prefill on a GPU: scores and lists by Triton, attention by CUDA or Triton.

The same functions as in `kernels.prefill_sparse`, which says what they do. Scoring is bound by its
exponentials (one per key and sampled query), not by products or memory, so a Triton kernel is as
good as any; attention to the lists runs in the CUDA kernel of dense prefill where there is one.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from kernels import cuda_prefill
from kernels._checks import check_shapes
from kernels._launch import KernelLibrary
from kernels.block_choice import choose_blocks
from kernels.cuda_prefill import BlockLists
from kernels.decode_inputs import check_age_bias
from kernels.list_attention import list_attention
from kernels.prefill_tiles import MAX_MASSES, SAMPLED, TILE_QUERIES, PrefillTiles
from kernels.prefill_triton import TileConfig, is_supported, pages_of
from kernels.span_inputs import EVERYTHING, SpanInputs
from kernels.tile_scores import tile_masses, tile_shares

RUN_BLOCKS = 64  # scored by one program
SHARED_BLOCKS = 256  # whose shares one program finds
MIN_CHOSEN, CHOSEN_BLOCKS = 128, 1024  # looked at together by one program


def score_tiles(
    qi_THI: Tensor,
    index_row_H: Tensor,
    index_cache: Tensor,
    block_tables_SB: Tensor,
    tiles: PrefillTiles,
    index_scales: Tensor | None = None,
    age_bias_HA: Tensor | None = None,
) -> Tensor:
    """Log share of every block for every tile of queries, float32 [Z, H, B]; waits for nothing.

    Raises:
        ValueError: shapes that do not fit, or an index_dim or pages that no kernel takes.
    """
    check_shapes(
        {},
        qi=(qi_THI, "T H I"),
        index_row=(index_row_H, "H"),
        index_cache=(index_cache, "P X K I"),
        block_tables=(block_tables_SB, "S B"),
    )
    heads, dim = qi_THI.shape[1:]
    check_age_bias(age_bias_HA, heads)
    width, block_tokens = block_tables_SB.shape[1], index_cache.shape[2]
    if not is_supported(dim, block_tokens):
        raise ValueError(f"no kernel for pages of {block_tokens} tokens with index_dim {dim}")
    scales = index_cache if index_scales is None else index_scales
    biases = index_cache if age_bias_HA is None else age_bias_HA
    qi_THI = qi_THI.contiguous()
    share_ZHB = qi_THI.new_empty((tiles.count, heads, width), dtype=torch.float32)
    runs = triton.cdiv(width, RUN_BLOCKS)
    most = max(1, MAX_MASSES // (heads * SAMPLED * width))
    held = min(most, tiles.count)
    masses = share_ZHB.new_empty((held, heads, width, SAMPLED))
    totals = share_ZHB.new_empty((held, heads, runs, SAMPLED))
    for start in range(0, tiles.count, most):
        part = slice(start, min(start + most, tiles.count))
        count = part.stop - part.start
        tile_masses[(count, heads, runs)](
            qi_THI,
            index_row_H,
            index_cache,
            scales,
            biases,
            block_tables_SB,
            tiles.span_Z[part],
            tiles.sampled_ZQ[part],
            tiles.position_T,
            masses,
            totals,
            *qi_THI.stride()[:2],
            block_tables_SB.stride(0),
            index_cache.shape[1],
            heads,
            width,
            DIM=dim,
            SAMPLED=SAMPLED,
            KEYS=block_tokens,
            BLOCKS=RUN_BLOCKS,
            SCALED=index_scales is not None,
            BIASED=age_bias_HA is not None,
            STAGES=3,
            num_warps=1,
        )
        tile_shares[(count, heads, triton.cdiv(width, SHARED_BLOCKS))](
            masses,
            totals,
            tiles.last_position_Z[part],
            share_ZHB[part],
            heads,
            width,
            runs,
            SAMPLED=SAMPLED,
            KEYS=block_tokens,
            BLOCKS=SHARED_BLOCKS,
            RUNS=triton.next_power_of_2(runs),
        )
    return share_ZHB


def choose_lists(
    log_share_ZHB: Tensor,
    top_p_H: Tensor,
    tiles: PrefillTiles,
    dense_from_S: Tensor,
    dense_below: int,
    block_tokens: int,
) -> BlockLists:
    """The blocks that `kernels.prefill_sparse.select_tiles` keeps, in order."""
    check_shapes({}, shares=(log_share_ZHB, "Z H B"), top_p=(top_p_H, "H"))
    count, heads, width = log_share_ZHB.shape
    blocks = torch.empty(log_share_ZHB.shape, dtype=torch.int32, device=log_share_ZHB.device)
    counts = blocks.new_empty((count, heads))
    choose_blocks[(count, heads)](
        log_share_ZHB.contiguous(),
        top_p_H.float().contiguous(),
        tiles.span_Z,
        tiles.first_position_Z,
        tiles.last_position_Z,
        dense_from_S,
        blocks,
        counts,
        heads,
        width,
        dense_below,
        KEYS=block_tokens,
        BLOCKS=min(CHOSEN_BLOCKS, max(MIN_CHOSEN, triton.next_power_of_2(width))),
    )
    return BlockLists(blocks, counts)


def attend_lists(
    library: KernelLibrary | None,
    inputs: SpanInputs,
    tiles: PrefillTiles,
    lists: BlockLists,
    scale: float,
) -> None:
    """Attention of some heads to the blocks of their tiles, written into `inputs.out_THD`.

    Args:
        library: with the CUDA kernel if it takes such caches; None: Triton's.
    """
    if library is not None:
        cuda_prefill.attend_spans(library, inputs, EVERYTHING, 0, scale, lists)
        return
    inputs.check()
    q_THD, out_THD, _, _, k_cache, v_cache, tables_SB, _, _ = inputs
    _, cache_heads, keys, dim = k_cache.shape
    if not is_supported(dim, keys):
        raise ValueError(f"no kernel for pages of {keys} tokens with head_dim {dim}")
    config = TileConfig.default(q_THD.dtype)
    group = inputs.heads_G.shape[0]
    list_attention[(tiles.count * (TILE_QUERIES // config.queries) * group,)](
        q_THD,
        out_THD,
        inputs.heads_G,
        inputs.kv_row_G,
        pages_of(k_cache),
        pages_of(v_cache),
        tables_SB,
        tiles.span_Z,
        tiles.begin_Z,
        tiles.end_Z,
        tiles.last_position_Z,
        lists.blocks,
        lists.counts,
        group,
        *q_THD.stride()[:2],
        *out_THD.stride()[:2],
        tables_SB.stride(0),
        cache_heads,
        lists.blocks.shape[2],
        scale * math.log2(math.e),
        DIM=dim,
        TILE=TILE_QUERIES,
        QUERIES=config.queries,
        KEYS=keys,
        STAGES=config.stages,
        PRECISION="ieee" if q_THD.dtype == torch.float32 else "tf32",
        num_warps=config.warps,
    )
