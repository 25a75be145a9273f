"""The specification of `kernels.decode`: one row and one head at a time, in float32.

    R decode rows (one query token each), H query heads of the call, D head_dim, N KV heads in the
    cache, P pages, K tokens of a page (block), B block-table width in logical blocks

A cache is [P, N, K, D]. Block tables are int64, indexed by logical block. `kv_row_H` gives each
query head its row among the N cached KV heads; `context_lens_R` counts the tokens that a row may
see, its own the last of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.window_plan import WindowPlan


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
