"""The specification: every attention op in plain PyTorch, one token and one head at a time.

The modules beside this one hold the same functions under the same names, fast; tests compare them.
All arithmetic here is float32. Shapes:

    T tokens, S prefill spans, R decode rows (one query token each), H query heads of the call,
    N KV heads in the cache, D head_dim, I index_dim, P pages, K tokens of a page (block),
    B block-table width in logical blocks, Z tiles of prefill queries, Q sampled queries of a tile

A cache is [P, N, K, D]; page 0 is the null page that padding points to. Block tables are int64,
indexed by logical block. `kv_row_H` gives each query head its row among the N cached KV heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.prefill_tiles import PrefillTiles
from kernels.window_plan import WindowPlan

BINS = 256  # of the selection histogram
BINS_PER_NAT = 8
INDEX_STEPS = 127  # of an index key in 8 bits, to either side of 0
MASS_UNIT = 2.0**32  # masses are summed as whole multiples of 1 / MASS_UNIT, so order cannot matter


def store_kv(
    k_TND: Tensor, v_TND: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor
) -> None:
    """Write keys and values of new tokens; slot = page * K + place in the page, int64."""
    block_tokens = k_cache.shape[2]
    for token, slot in enumerate(slots_T.tolist()):
        page, place = divmod(slot, block_tokens)
        k_cache[page, :, place] = k_TND[token]
        v_cache[page, :, place] = v_TND[token]


def quantise_index_keys(keys_THI: Tensor) -> tuple[Tensor, Tensor]:
    """Index keys in 8 bits and what they are to be multiplied by: int8 [T, H, I], bfloat16 [T, H].

    The scale is the largest |k| of the key over 127; the key is divided by the scale as it is
    stored and rounded to the nearest whole number, of two to the even one. A key of zeros has the
    scale 0. What is not finite gives a scale that is not finite, and so do all its scores.
    """
    steps_THI = torch.zeros(keys_THI.shape, dtype=torch.int8)
    scales_TH = torch.zeros(keys_THI.shape[:2], dtype=torch.bfloat16)
    for token in range(keys_THI.shape[0]):
        for head in range(keys_THI.shape[1]):
            key_I = keys_THI[token, head].float()
            scale = (key_I.abs().max() / INDEX_STEPS).bfloat16()
            scales_TH[token, head] = scale
            if scale != 0 and scale.isfinite():
                steps_I = (key_I / scale.float()).round()
                steps_THI[token, head] = steps_I.clamp(-INDEX_STEPS, INDEX_STEPS)
    return steps_THI, scales_TH


def store_index_keys(
    index_keys_THI: Tensor,
    index_cache: Tensor,
    slots_T: Tensor,
    index_scales: Tensor | None = None,
) -> None:
    """Write index keys of new tokens into [P, index rows, K, I].

    With scales, bfloat16 [P, index rows, K], the cache is int8 and keys are quantised.
    """
    scales_TH = None
    if index_scales is not None:
        index_keys_THI, scales_TH = quantise_index_keys(index_keys_THI)
    block_tokens = index_cache.shape[2]
    for token, slot in enumerate(slots_T.tolist()):
        page, place = divmod(slot, block_tokens)
        index_cache[page, :, place] = index_keys_THI[token]
        if index_scales is not None and scales_TH is not None:
            index_scales[page, :, place] = scales_TH[token]


def project_index(x_TND: Tensor, weight_HID: Tensor, head_H: Tensor) -> Tensor:
    """Project pre-RoPE queries or keys to the index space: [T, H, I].

    Row h of the result is weight_HID[h] applied to x_TND[:, head_H[h]].
    """
    rows = [
        x_TND[:, head].float() @ weight_HID[row].float().T
        for row, head in enumerate(head_H.tolist())
    ]
    return torch.stack(rows, dim=1)


def score_blocks(
    qi_RHI: Tensor,
    index_row_H: Tensor,
    index_cache: Tensor,
    block_tables_RB: Tensor,
    context_lens_R: Tensor,
    index_scales: Tensor | None = None,
) -> Tensor:
    """Log mass of every block, float32 [R, H, B]: logsumexp of q·k over the block's valid tokens.

    Blocks past the end of a row's context have -inf. With scales q·k is multiplied by the key's.
    """
    rows, width = block_tables_RB.shape
    log_mass_RHB = torch.full((rows, qi_RHI.shape[1], width), -math.inf)
    block_tokens = index_cache.shape[2]
    for row, context in enumerate(context_lens_R.tolist()):
        for head, index_row in enumerate(index_row_H.tolist()):
            for block in range(math.ceil(context / block_tokens)):
                valid = min(block_tokens, context - block * block_tokens)
                page = block_tables_RB[row, block]
                keys = index_cache[page, index_row, :valid].float()
                scores = keys @ qi_RHI[row, head].float()
                if index_scales is not None:
                    scores *= index_scales[page, index_row, :valid].float()
                log_mass_RHB[row, head, block] = scores.logsumexp(0)
    return log_mass_RHB


def select_blocks(
    log_mass_RHB: Tensor, top_p_RH: Tensor, context_lens_R: Tensor, block_tokens: int
) -> Tensor:
    """Dynamic top-p over blocks, bool [R, H, B] (design section 5).

    Blocks fall into 256 bins of 1/8 nat below the head's largest log mass, the last bin open. Bins
    are taken from the top until their mass reaches top_p of the total; the bin that reaches it is
    taken whole, so the kept mass is never below top_p. top_p of 1 keeps every block. The first
    block (sinks), the newest and the one before it are always kept. A log mass that is not finite
    counts as no mass, so a sequence whose values have gone wrong selects what is forced.
    """
    mask_RHB = torch.zeros(log_mass_RHB.shape, dtype=torch.bool)
    for row, context in enumerate(context_lens_R.tolist()):
        blocks = math.ceil(context / block_tokens)
        for head in range(log_mass_RHB.shape[1]):
            mass_B = log_mass_RHB[row, head, :blocks]
            finite_B = mass_B.where(mass_B.isfinite(), torch.tensor(-math.inf))
            below_B = finite_B.max().clamp(min=torch.finfo(torch.float32).min) - finite_B
            bin_B = (below_B * BINS_PER_NAT).clamp(max=BINS - 1).long()
            mass_B = ((-below_B).exp().double() * MASS_UNIT).round().long()
            wanted = float(top_p_RH[row, head].double()) * float(mass_B.sum())
            taken = torch.zeros(BINS, dtype=torch.int64).index_add_(0, bin_B, mass_B).cumsum(0)
            threshold = int((taken >= wanted).int().argmax())
            if top_p_RH[row, head] >= 1:
                threshold = BINS - 1
            mask_RHB[row, head, :blocks] = bin_B <= threshold
            mask_RHB[row, head, [0, blocks - 1, max(blocks - 2, 0)]] = True
    return mask_RHB


def count_attended(mask_RHB: Tensor, context_lens_R: Tensor, block_tokens: int) -> Tensor:
    """Tokens in the kept blocks per row and head, int64 [R, H]; the last may be partial."""
    count_RH = torch.zeros(mask_RHB.shape[:2], dtype=torch.int64)
    for row, context in enumerate(context_lens_R.tolist()):
        for block in range(math.ceil(context / block_tokens)):
            valid = min(block_tokens, context - block * block_tokens)
            count_RH[row] += mask_RHB[row, :, block] * valid
    return count_RH


def decode_sparse(
    q_RHD: Tensor,
    kv_row_H: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_RB: Tensor,
    context_lens_R: Tensor,
    mask_RHB: Tensor,
    scale: float,
) -> Tensor:
    """Exact attention over the tokens of each row's and head's kept blocks: [R, H, D]."""
    block_tokens = k_cache.shape[2]
    out_RHD = torch.empty_like(q_RHD)
    for row, context in enumerate(context_lens_R.tolist()):
        positions = torch.arange(context)
        for head in range(q_RHD.shape[1]):
            seen = mask_RHB[row, head, positions // block_tokens]
            out_RHD[row, head] = _attend(
                q_RHD[row, head],
                positions[seen],
                int(kv_row_H[head]),
                k_cache,
                v_cache,
                block_tables_RB[row],
                scale,
            )
    return out_RHD


def decode_windowed(
    q_RHD: Tensor,
    kv_row_H: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_RB: Tensor,
    context_lens_R: Tensor,
    window: int,
    sinks: int,
    scale: float,
    plan: WindowPlan | None = None,
) -> Tensor:
    """Attention of the newest token to the last `window` tokens and the first `sinks`: [R, H, D].

    The query stands at position m = context - 1 and sees j <= m with m - j < window or j < sinks.
    A plan says the same in another form and is not read.
    """
    out_RHD = torch.empty_like(q_RHD)
    for row, context in enumerate(context_lens_R.tolist()):
        positions = torch.arange(context)
        seen = positions[(context - 1 - positions < window) | (positions < sinks)]
        for head in range(q_RHD.shape[1]):
            out_RHD[row, head] = _attend(
                q_RHD[row, head],
                seen,
                int(kv_row_H[head]),
                k_cache,
                v_cache,
                block_tables_RB[row],
                scale,
            )
    return out_RHD


def decode_dense(
    q_RHD: Tensor,
    kv_row_H: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_RB: Tensor,
    context_lens_R: Tensor,
    scale: float,
) -> Tensor:
    """Attention of the newest token to the whole context: [R, H, D]."""
    longest = int(context_lens_R.max())
    return decode_windowed(
        q_RHD, kv_row_H, k_cache, v_cache, block_tables_RB, context_lens_R, longest, 0, scale
    )


def prefill_windowed(
    q_THD: Tensor,
    kv_row_H: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_SB: Tensor,
    query_starts: Tensor,
    context_lens_S: Tensor,
    window: int,
    sinks: int,
    scale: float,
) -> Tensor:
    """Window and sinks for the query tokens of several spans, concatenated: [T, H, D].

    Span s has the queries [query_starts[s], query_starts[s + 1]); its last one stands at position
    context_lens_S[s] - 1. The spans' own keys and values are already in the cache.
    """
    out_THD = torch.empty_like(q_THD)
    starts = query_starts.tolist()
    for span, context in enumerate(context_lens_S.tolist()):
        begin, end = starts[span], starts[span + 1]
        contexts = torch.arange(context - (end - begin) + 1, context + 1)
        out_THD[begin:end] = decode_windowed(
            q_THD[begin:end],
            kv_row_H,
            k_cache,
            v_cache,
            block_tables_SB[span].expand(end - begin, -1),
            contexts,
            window,
            sinks,
            scale,
        )
    return out_THD


def prefill_dense(
    q_THD: Tensor,
    kv_row_H: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_SB: Tensor,
    query_starts: Tensor,
    context_lens_S: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention for the query tokens of several spans, concatenated: [T, H, D]."""
    longest = int(context_lens_S.max())
    return prefill_windowed(
        q_THD,
        kv_row_H,
        k_cache,
        v_cache,
        block_tables_SB,
        query_starts,
        context_lens_S,
        longest,
        0,
        scale,
    )


def score_tiles(
    qi_THI: Tensor,
    index_row_H: Tensor,
    index_cache: Tensor,
    block_tables_SB: Tensor,
    tiles: PrefillTiles,
    index_scales: Tensor | None = None,
) -> Tensor:
    """Log share of every block for every tile of queries, float32 [Z, H, B]; see `PrefillTiles`.

    The share of a block is the largest that a sampled query of the tile gives it: its mass over the
    mass of all keys up to the query. Blocks past the newest sampled query have -inf.
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


def _attend(
    q_D: Tensor,
    positions: Tensor,
    kv_row: int,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_B: Tensor,
    scale: float,
) -> Tensor:
    """Softmax attention of one query head of one token to the given positions."""
    block_tokens = k_cache.shape[2]
    pages, places = block_table_B[positions // block_tokens], positions % block_tokens
    keys, values = k_cache[pages, kv_row, places], v_cache[pages, kv_row, places]
    weights = (keys.float() @ q_D.float() * scale).softmax(0)
    return (weights @ values.float()).to(q_D.dtype)
