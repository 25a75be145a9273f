"""Decode attention over paged caches: one query token a row; specification in `kernels.reference`.

Only pages that a row can see are gathered. Replaying several generated tokens of one sequence is
several rows with the same table and growing context lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._checks import check_shapes
from kernels.head_groups import equal_groups, heads_by_row
from kernels.row_slices import row_slices
from kernels.window_plan import WindowPlan

SMALL = 2**18  # elements
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
    kv_heads, block_tokens, dim = k_cache.shape[1:]
    out_RHD = torch.empty_like(q_RHD)
    for kv_row, heads in heads_by_row(kv_row_H):
        # A page is read once for all query heads that share it: the union of their blocks.
        union_RB = mask_RHB[:, heads].any(1)
        counts_R = union_RB.sum(-1).tolist()
        for part in row_slices(counts_R, block_tokens * dim, MAX_GATHERED):
            most = max(counts_R[part])
            # A stable sort of the mask lists each row's blocks first, in their order.
            kept_RM, block_RM = union_RB[part].sort(stable=True, dim=-1, descending=True)
            kept_RM, block_RM = kept_RM[:, :most], block_RM[:, :most]
            pages_RM = block_tables_RB[part].gather(1, block_RM) * kv_heads + kv_row
            k_RSD, v_RSD = _gather(k_cache, pages_RM), _gather(v_cache, pages_RM)
            positions = block_RM[..., None] * block_tokens + torch.arange(
                block_tokens, device=q_RHD.device
            )
            inside_RMK = kept_RM[..., None] & (positions < context_lens_R[part, None, None])
            _clear_unseen(v_RSD[:, None], ~inside_RMK.flatten(1)[:, None], block_tokens)
            wanted = block_RM[:, None].expand(-1, len(heads), -1)
            chosen_RGM = mask_RHB[part][:, heads].gather(-1, wanted)
            seen_RGS = (chosen_RGM[..., None] & inside_RMK[:, None]).flatten(2)
            out_RHD[part, heads] = _attend(q_RHD[part, heads], k_RSD, v_RSD, ~seen_RGS, scale)
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
    """Attention to the last `window` tokens and the first `sinks` (at most a block): [R, H, D].

    Arguments as `decode_sparse`. Pages outside the window may be gone (0 in the table).

    Args:
        plan: `WindowPlan.of_window` of the same rows and rule; None makes it here.
    """
    _check(q_RHD, kv_row_H, k_cache, v_cache, block_tables_RB, context_lens_R)
    if plan is None:
        block_tokens, width = k_cache.shape[2], block_tables_RB.shape[1]
        plan = WindowPlan.of_window(context_lens_R, block_tokens, width, window, sinks)
    return _decode_plan(q_RHD, kv_row_H, k_cache, v_cache, block_tables_RB, plan, scale)


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
    plan = WindowPlan.of_context(context_lens_R, k_cache.shape[2])
    return _decode_plan(q_RHD, kv_row_H, k_cache, v_cache, block_tables_RB, plan, scale)


def _decode_plan(
    q_RHD: Tensor,
    kv_row_H: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_RB: Tensor,
    plan: WindowPlan,
    scale: float,
) -> Tensor:
    """Attention over the blocks of a plan; a page is read once per KV head."""
    kv_heads, block_tokens, dim = k_cache.shape[1:]
    pages_RM = block_tables_RB.gather(1, plan.block_RM)
    blocks = [pages_RM.shape[1]] * len(pages_RM)
    out_RHD = torch.empty_like(q_RHD)
    for kv_rows, members in equal_groups(kv_row_H):
        count = len(kv_rows)
        row_N1 = torch.tensor(kv_rows, device=q_RHD.device)[:, None]
        # Slices are views, lists of heads are copies.
        heads = slice(None) if members == list(range(q_RHD.shape[1])) else members
        for part in row_slices(blocks, count * block_tokens * dim, MAX_GATHERED):
            pages_ZM = (pages_RM[part, None] * kv_heads + row_N1).flatten(0, 1)
            k_ZSD, v_ZSD = _gather(k_cache, pages_ZM), _gather(v_cache, pages_ZM)
            unseen_RNS = plan.unseen_RS[part, None].expand(-1, count, -1)
            _clear_unseen(v_ZSD.view(*unseen_RNS.shape, dim), unseen_RNS, block_tokens)
            q_ZGD = q_RHD[part, heads].reshape(len(pages_ZM), -1, dim)
            out_ZGD = _attend(q_ZGD, k_ZSD, v_ZSD, unseen_RNS[:, :, None], scale)
            out_RHD[part, heads] = out_ZGD.view(-1, len(members), dim)
    return out_RHD


def _gather(cache: Tensor, pages_ZM: Tensor) -> Tensor:
    """Tokens of (page, KV head) pairs, given as page * N + head: [Z, M * K, D], a copy."""
    block_tokens, dim = cache.shape[2:]
    flat = cache.view(-1, block_tokens * dim)
    return flat.index_select(0, pages_ZM.flatten()).view(len(pages_ZM), -1, dim)


def _attend(q_ZGD: Tensor, k_ZSD: Tensor, v_ZSD: Tensor, unseen: Tensor, scale: float) -> Tensor:
    """Masked softmax attention of G queries of each batch entry over its S keys: [Z, G, D].

    Keys that are not seen may hold anything, NaN included; such values must be finite.

    Args:
        unseen: bool [..., G or 1, S], the leading dimensions together Z.
    """
    scores_ZGS = torch.bmm(q_ZGD, k_ZSD.transpose(1, 2)).float() * scale
    scores = scores_ZGS.view(*unseen.shape[:-2], -1, unseen.shape[-1])
    scores.masked_fill_(unseen, float("-inf"))
    return torch.bmm(scores_ZGS.softmax(-1).to(v_ZSD.dtype), v_ZSD)


def _clear_unseen(v_RNSD: Tensor, unseen_RNS: Tensor, block_tokens: int) -> None:
    """Zero the gathered values that no query sees, which may be NaN: a weight of 0 is not enough.

    Of many values only the blocks that are not seen whole are touched; for few, finding those
    blocks would take longer than to touch all.
    """
    if v_RNSD.numel() <= SMALL:
        v_RNSD.masked_fill_(unseen_RNS.unsqueeze(-1), 0.0)
        return
    unseen_ZK = unseen_RNS.reshape(-1, block_tokens)
    blocks = unseen_ZK.any(-1).nonzero().squeeze(1)
    v_ZKD = v_RNSD.view(-1, block_tokens, v_RNSD.shape[-1])
    v_ZKD[blocks] = v_ZKD[blocks].masked_fill_(unseen_ZK[blocks].unsqueeze(-1), 0.0)


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
