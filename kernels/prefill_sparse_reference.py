"""The specification of `kernels.prefill_sparse`: one tile of queries at a time.

    T query tokens, S prefill spans, Z tiles of queries, Q sampled queries of a tile, H query heads
    of the call, D head_dim, I index_dim, B block-table width in logical blocks

Blocks are scored and chosen as in `indexer_reference`, and attended as in `decode_reference`, whose
caches, block tables and `kv_row_H` these are; `kernels.prefill_tiles` says what a tile is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.decode_reference import decode_sparse
from kernels.indexer_reference import score_blocks, select_blocks
from kernels.prefill_tiles import PrefillTiles


def score_tiles(
    qi_THI: Tensor,
    index_row_H: Tensor,
    index_cache: Tensor,
    block_tables_SB: Tensor,
    tiles: PrefillTiles,
    index_scales: Tensor | None = None,
    age_bias_HA: Tensor | None = None,
) -> Tensor:
    """Log share of every block for every tile of queries, float32 [Z, H, B]; see `PrefillTiles`.

    The share of a block is the largest that a sampled query of the tile gives it: its mass over the
    mass of all keys up to the query. Blocks past the newest sampled query have -inf. Ages count
    from the block that the query lies in.
    """
    heads, width = qi_THI.shape[1], block_tables_SB.shape[1]
    log_share_ZHB = torch.full((tiles.count, heads, width), -math.inf)
    for tile, span in enumerate(tiles.span_Z.tolist()):
        rows = tiles.sampled_ZQ[tile]
        log_mass_QHB = score_blocks(
            qi_THI[rows],
            index_row_H,
            index_cache,
            block_tables_SB[span].expand(len(rows), -1),
            tiles.position_T[rows] + 1,
            index_scales,
            age_bias_HA,
        )
        log_share_QHB = log_mass_QHB - log_mass_QHB.logsumexp(-1, keepdim=True)
        log_share_ZHB[tile] = log_share_QHB.amax(0)
    return log_share_ZHB


def select_tiles(
    log_share_ZHB: Tensor,
    top_p_H: Tensor,
    tiles: PrefillTiles,
    dense_from_S: Tensor,
    dense_below: int,
    block_tokens: int,
) -> Tensor:
    """Blocks that each tile reads, bool [Z, H, B].

    By the rule of `select_blocks`. The blocks of the tile's own tokens and the one before them are
    always kept. A tile with a query at or past its span's `dense_from_S`, or with fewer than
    `dense_below` tokens up to its last query, keeps every block.
    """
    last_Z = tiles.last_position_Z
    top_p_ZH = top_p_H.expand(tiles.count, -1)
    mask_ZHB = select_blocks(log_share_ZHB, top_p_ZH, last_Z + 1, block_tokens)
    for tile, last in enumerate(last_Z.tolist()):
        first_block = int(tiles.first_position_Z[tile]) // block_tokens
        kept = slice(max(0, first_block - 1), last // block_tokens + 1)
        if last >= int(dense_from_S[tiles.span_Z[tile]]) or last + 1 < dense_below:
            kept = slice(0, kept.stop)
        mask_ZHB[tile, :, kept] = True
    return mask_ZHB


def prefill_sparse(
    q_THD: Tensor,
    kv_row_H: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_SB: Tensor,
    tiles: PrefillTiles,
    mask_ZHB: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of every query to the tokens of its tile's kept blocks: [T, H, D]."""
    out_THD = torch.empty_like(q_THD)
    for tile, span in enumerate(tiles.span_Z.tolist()):
        rows = slice(int(tiles.begin_Z[tile]), int(tiles.end_Z[tile]))
        out_THD[rows] = decode_sparse(
            q_THD[rows],
            kv_row_H,
            k_cache,
            v_cache,
            block_tables_SB[span].expand(rows.stop - rows.start, -1),
            tiles.position_T[rows] + 1,
            mask_ZHB[tile].expand(rows.stop - rows.start, -1, -1),
            scale,
        )
    return out_THD
