"""Sparse prefill of retrieval heads, vectorised; specification in `kernels.reference`.

A tile of 128 queries reads the blocks that some of its queries want, by the index that decoding
uses. Every eighth query scores all keys before it exactly, and a block's share is the largest of
theirs: a block that a single query needs is needed whole. Top-p then runs over these shares.

On the embedded model and 6K tokens of Python (KL to dense prefill per token, share of blocks read):
the largest share 0.0058 with 65 %, the mean of shares 0.0056 with 66 %, the tile's mean query 0.033
with 54 % and still 0.011 with 72 %. Largest and mean cost the same; the mean query saves nearly all
of the scoring and loses too much.

The first block, the tile's own and the one before them are always read, and the last
queries of a prompt, which ask about it, read everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._checks import check_shapes
from kernels.block_age import row_ranges
from kernels.head_groups import heads_by_row
from kernels.indexer import select_blocks
from kernels.paged_kv import gather_pages
from kernels.prefill_tiles import PrefillTiles

DENSE_TAIL = 128  # last queries of a prompt that read everything
TILES_AT_ONCE = 16  # whose scores are held


def score_tiles(
    qi_THI: Tensor,
    index_row_H: Tensor,
    index_cache: Tensor,
    block_tables_SB: Tensor,
    tiles: PrefillTiles,
    index_scales: Tensor | None = None,
    age_bias_HA: Tensor | None = None,
) -> Tensor:
    """Log share of every block for every tile of queries, float32 [Z, H, B].

    Args:
        qi_THI: index queries.
        index_row_H: int64, row of each head's index keys in the cache.
        index_cache: [P, index rows, K, I]; the spans' own keys are already stored.
        block_tables_SB: int64 pages by logical block.
        index_scales: bfloat16 [P, index rows, K] of int8 keys.
        age_bias_HA: float32, as `kernels.block_age`, where every query has ages of its own; None:
            no bias.
    """
    sizes: dict[str, int] = {}
    check_shapes(
        sizes,
        qi=(qi_THI, "T H I"),
        index_row=(index_row_H, "H"),
        index_cache=(index_cache, "P X K I"),
        block_tables=(block_tables_SB, "S B"),
    )
    if age_bias_HA is not None:
        check_shapes(sizes, age_bias=(age_bias_HA, "H A"))
    heads, width = qi_THI.shape[1], block_tables_SB.shape[1]
    log_share_ZHB = qi_THI.new_full((tiles.count, heads, width), float("-inf"), dtype=torch.float32)
    spans = tiles.span_Z.tolist()
    for start in range(0, tiles.count, TILES_AT_ONCE):
        for span in sorted(set(spans[start : start + TILES_AT_ONCE])):
            stop = min(start + TILES_AT_ONCE, tiles.count)
            part = [tile for tile in range(start, stop) if spans[tile] == span]
            table_B = block_tables_SB[span]
            keys = (index_row_H, index_cache, index_scales)
            _score_part(log_share_ZHB, part, qi_THI, *keys, table_B, tiles, age_bias_HA)
    return log_share_ZHB


def _score_part(
    log_share_ZHB: Tensor,
    part: list[int],
    qi_THI: Tensor,
    index_row_H: Tensor,
    index_cache: Tensor,
    index_scales: Tensor | None,
    table_B: Tensor,
    tiles: PrefillTiles,
    age_bias_HA: Tensor | None,
) -> None:
    """Fill in the tiles of `part`, which are of one span."""
    block_tokens = index_cache.shape[2]
    rows_X = tiles.sampled_ZQ[part].flatten()
    positions_X1 = tiles.position_T[rows_X].unsqueeze(1)
    blocks = int(positions_X1.max()) // block_tokens + 1
    future_XS = torch.arange(blocks * block_tokens, device=table_B.device) > positions_X1
    ranges_XB = None
    if age_bias_HA is not None:
        ranges_XB = row_ranges(tiles.position_T[rows_X] + 1, blocks, block_tokens)
    for head, index_row in enumerate(index_row_H.tolist()):
        pages_B = table_B[:blocks]
        keys_SI = gather_pages(index_cache, index_row, pages_B).to(qi_THI.dtype)
        scores_XS = (qi_THI[rows_X, head] @ keys_SI.T).float()
        if index_scales is not None:
            scores_XS = scores_XS * gather_pages(index_scales, index_row, pages_B)
        scores_XS = scores_XS.masked_fill_(future_XS, float("-inf"))
        log_mass_XB = scores_XS.view(len(rows_X), blocks, block_tokens).logsumexp(-1)
        if age_bias_HA is not None:
            log_mass_XB += age_bias_HA[head, ranges_XB]
        log_share_XB = log_mass_XB - log_mass_XB.logsumexp(-1, keepdim=True)
        log_share_ZHB[part, head, :blocks] = log_share_XB.view(len(part), -1, blocks).amax(1)


def select_tiles(
    log_share_ZHB: Tensor,
    top_p_H: Tensor,
    tiles: PrefillTiles,
    dense_from_S: Tensor,
    dense_below: int,
    block_tokens: int,
) -> Tensor:
    """Blocks that each tile reads, bool [Z, H, B].

    Args:
        log_share_ZHB: from `score_tiles`.
        top_p_H: share of the mass to keep, in (0, 1].
        dense_from_S: int64; tiles with a query at or past this position keep every block,
        dense_below: and so do tiles that have fewer tokens up to their last query.
    """
    check_shapes({}, shares=(log_share_ZHB, "Z H B"), top_p=(top_p_H, "H"))
    top_p_ZH = top_p_H.expand(tiles.count, -1)
    mask_ZHB = select_blocks(log_share_ZHB, top_p_ZH, tiles.last_position_Z + 1, block_tokens)
    block_B = torch.arange(log_share_ZHB.shape[2], device=log_share_ZHB.device)
    first_Z1 = (tiles.first_position_Z // block_tokens).unsqueeze(1)
    last_Z1 = (tiles.last_position_Z // block_tokens).unsqueeze(1)
    is_tail_Z = tiles.last_position_Z >= dense_from_S[tiles.span_Z]
    dense_Z1 = (is_tail_Z | (tiles.last_position_Z + 1 < dense_below)).unsqueeze(1)
    forced_ZB = (block_B <= last_Z1) & ((block_B >= first_Z1 - 1) | dense_Z1)
    return mask_ZHB | forced_ZB.unsqueeze(1)


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
    """Causal attention of every query to the tokens of its tile's kept blocks: [T, H, D].

    Args:
        q_THD: queries after RoPE.
        kv_row_H: int64, row of each query head's KV head in the cache.
        k_cache, v_cache: [P, N, K, D]; the spans' own keys and values are already stored.
        block_tables_SB: int64 pages by logical block.
        mask_ZHB: from `select_tiles`.
        scale: factor on q·k.
    """
    check_shapes(
        {},
        q=(q_THD, "T H D"),
        kv_row=(kv_row_H, "H"),
        k_cache=(k_cache, "P N K D"),
        v_cache=(v_cache, "P N K D"),
        block_tables=(block_tables_SB, "S B"),
        mask=(mask_ZHB, "Z H B"),
    )
    out_THD = torch.empty_like(q_THD)
    bounds = zip(*(x.tolist() for x in (tiles.span_Z, tiles.begin_Z, tiles.end_Z)), strict=True)
    offsets_K = torch.arange(k_cache.shape[2], device=q_THD.device)
    for tile, (span, begin, end) in enumerate(bounds):
        rows = slice(begin, end)
        for kv_row, heads in heads_by_row(kv_row_H):
            for head in heads:
                blocks_B = mask_ZHB[tile, head].nonzero().squeeze(1)
                pages_B = block_tables_SB[span, blocks_B]
                key_S = (blocks_B[:, None] * k_cache.shape[2] + offsets_K).flatten()
                unseen_TS = key_S > tiles.position_T[rows, None]
                # Past the context's end lies anything, and 0 * NaN is not 0.
                held_S1 = (key_S <= tiles.last_position_Z[tile]).unsqueeze(1)
                k_SD = gather_pages(k_cache, kv_row, pages_B)
                v_SD = gather_pages(v_cache, kv_row, pages_B).where(held_S1, 0)
                scores_TS = (q_THD[rows, head] @ k_SD.T).float() * scale
                weights_TS = scores_TS.masked_fill_(unseen_TS, float("-inf")).softmax(-1)
                out_THD[rows, head] = weights_TS.to(v_SD.dtype) @ v_SD
    return out_THD
