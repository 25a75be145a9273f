"""Decode attention over paged caches: one query token a row; specification in `kernels.reference`.

Only pages that a row can see are gathered. Replaying several generated tokens of one sequence is
several rows with the same table and growing context lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._checks import check_shapes
from kernels.head_groups import heads_by_row
from kernels.row_slices import row_slices

MAX_GATHERED = 2**24  # cache elements gathered at once; 64 MiB in float32


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
    """Exact attention over each row's and head's selected blocks: [R, H, D].

    Args:
        q_RHD: queries after RoPE.
        kv_row_H: int64, row of each query head's KV head in the cache.
        k_cache, v_cache: [P, N, K, D].
        block_tables_RB: int64 pages by logical block.
        context_lens_R: int64, position of each query + 1.
        mask_RHB: bool from `select_blocks`; at least one block a row and head.
        scale: factor on q·k.
    """
    _check(q_RHD, kv_row_H, k_cache, v_cache, block_tables_RB, context_lens_R)
    check_shapes({}, q=(q_RHD, "R H D"), mask=(mask_RHB, "R H B"))
    _, heads, dim = q_RHD.shape
    kv_heads, block_tokens = k_cache.shape[1:3]
    counts_R = mask_RHB.sum(-1).amax(-1).tolist()
    out_RHD = torch.empty_like(q_RHD)
    for part in row_slices(counts_R, heads * block_tokens * dim, MAX_GATHERED):
        most = max(counts_R[part])
        # A stable sort of the mask lists each head's blocks first, in their order.
        kept_RHM, block_RHM = mask_RHB[part].sort(stable=True, dim=-1, descending=True)
        kept_RHM, block_RHM = kept_RHM[..., :most], block_RHM[..., :most]
        tables = block_tables_RB[part, None].expand(-1, heads, -1)
        pages_RHM = tables.gather(-1, block_RHM) * kv_heads + kv_row_H[:, None]
        k, v = (
            cache.flatten(0, 1)
            .index_select(0, pages_RHM.flatten())
            .view(-1, most * block_tokens, dim)
            for cache in (k_cache, v_cache)
        )
        positions = block_RHM[..., None] * block_tokens + torch.arange(
            block_tokens, device=q_RHD.device
        )
        seen = kept_RHM[..., None] & (positions < context_lens_R[part, None, None, None])
        _clear_unseen(v, seen.view(len(k), most, block_tokens))
        out = _attend(q_RHD[part].reshape(-1, 1, dim), k, v, seen.view(len(k), -1), scale)
        out_RHD[part] = out.view(-1, heads, dim)
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
) -> Tensor:
    """Attention to the last `window` tokens and the first `sinks` (at most a block): [R, H, D].

    Arguments as `decode_sparse`. Pages outside the window may be gone (0 in the table).
    """
    _check(q_RHD, kv_row_H, k_cache, v_cache, block_tables_RB, context_lens_R)
    block_tokens = k_cache.shape[2]
    live = min(-(-window // block_tokens) + 1, block_tables_RB.shape[1])
    last_R = (context_lens_R - 1) // block_tokens
    # Newest blocks first, then the block of the sinks where the window does not reach it.
    block_RM = last_R[:, None] - torch.arange(live, device=q_RHD.device)
    sink_R1 = torch.where(last_R[:, None] >= live, 0, -1)
    block_RM = torch.cat((block_RM, sink_R1), dim=1)
    return _decode_blocks(
        q_RHD,
        kv_row_H,
        k_cache,
        v_cache,
        block_tables_RB,
        block_RM,
        context_lens_R,
        window,
        sinks,
        scale,
    )


def decode_dense(
    q_RHD: Tensor,
    kv_row_H: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_RB: Tensor,
    context_lens_R: Tensor,
    scale: float,
) -> Tensor:
    """Attention to the whole context, arguments as `decode_sparse`: [R, H, D]."""
    _check(q_RHD, kv_row_H, k_cache, v_cache, block_tables_RB, context_lens_R)
    block_tokens = k_cache.shape[2]
    widest = -(-int(context_lens_R.max()) // block_tokens)
    block_RM = torch.arange(widest, device=q_RHD.device).expand(len(q_RHD), -1)
    return _decode_blocks(
        q_RHD,
        kv_row_H,
        k_cache,
        v_cache,
        block_tables_RB,
        block_RM,
        context_lens_R,
        widest * block_tokens,
        0,
        scale,
    )


def _decode_blocks(
    q_RHD: Tensor,
    kv_row_H: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_RB: Tensor,
    block_RM: Tensor,
    context_lens_R: Tensor,
    window: int,
    sinks: int,
    scale: float,
) -> Tensor:
    """The window rule over the given logical blocks (-1: none), one gather per KV head."""
    block_tokens, dim = k_cache.shape[2:]
    pages_RM = block_tables_RB.gather(1, block_RM.clamp(0, block_tables_RB.shape[1] - 1))
    offsets_K = torch.arange(block_tokens, device=q_RHD.device)
    positions_RS = (block_RM[..., None] * block_tokens + offsets_K).flatten(1)
    newest_R1 = context_lens_R[:, None] - 1
    near_RS = (newest_R1 - positions_RS < window) | (positions_RS < sinks)
    seen_RS = near_RS & (positions_RS <= newest_R1) & (positions_RS >= 0)
    out_RHD = torch.empty_like(q_RHD)
    blocks_R = [block_RM.shape[1]] * len(q_RHD)
    for part in row_slices(blocks_R, block_tokens * dim, MAX_GATHERED):
        for kv_row, heads in heads_by_row(kv_row_H):
            k_RSD, v_RSD = (
                cache[pages_RM[part], kv_row].flatten(1, 2) for cache in (k_cache, v_cache)
            )
            _clear_unseen(v_RSD, seen_RS[part].view(len(v_RSD), -1, block_tokens))
            out_RHD[part, heads] = _attend(q_RHD[part, heads], k_RSD, v_RSD, seen_RS[part], scale)
    return out_RHD


def _attend(q_ZGD: Tensor, k_ZSD: Tensor, v_ZSD: Tensor, seen_ZS: Tensor, scale: float) -> Tensor:
    """Masked softmax attention of G queries of each batch entry over its S keys: [Z, G, D].

    Keys that are not seen may hold anything, NaN included; such values must be finite.
    """
    scores_ZGS = torch.bmm(q_ZGD, k_ZSD.transpose(1, 2)).float() * scale
    weights_ZGS = scores_ZGS.masked_fill_(~seen_ZS[:, None], float("-inf")).softmax(-1)
    return torch.bmm(weights_ZGS.to(v_ZSD.dtype), v_ZSD)


def _clear_unseen(v_ZSD: Tensor, seen_ZMK: Tensor) -> None:
    """Zero the gathered values that no query sees, which may be NaN: a weight of 0 is not enough.

    Only blocks that are not seen whole are touched, which are few.
    """
    blocks = (~seen_ZMK.all(-1)).flatten().nonzero().squeeze(1)
    v_blocks = v_ZSD.view(-1, seen_ZMK.shape[-1], v_ZSD.shape[-1])
    unseen = ~seen_ZMK.flatten(0, 1)[blocks]
    v_blocks[blocks] = v_blocks[blocks].masked_fill_(unseen[..., None], 0.0)


def _check(
    q_RHD: Tensor,
    kv_row_H: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_RB: Tensor,
    context_lens_R: Tensor,
) -> None:
    check_shapes(
        {},
        q=(q_RHD, "R H D"),
        kv_row=(kv_row_H, "H"),
        k_cache=(k_cache, "P N K D"),
        v_cache=(v_cache, "P N K D"),
        block_tables=(block_tables_RB, "R B"),
        context_lens=(context_lens_R, "R"),
    )
