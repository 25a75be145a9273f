"""The specification of `kernels.prefill`: every query token is a row of `decode_reference`.

    T query tokens, S prefill spans, H query heads of the call, D head_dim, N KV heads in the cache,
    P pages, K tokens of a page (block), B block-table width in logical blocks

Caches [P, N, K, D], block tables and `kv_row_H` as for decode; a table and a context a span.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.decode_reference import decode_windowed


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
