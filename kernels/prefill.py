"""Prefill attention over paged caches, vectorised; specification in `kernels.reference`.

No n x n matrix is ever built: dense spans are split into a prefix without a mask and a causal
diagonal, windowed spans into tiles whose cost is their tokens times the window.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels._checks import check_shapes
from kernels.head_groups import heads_by_row
from kernels.paged_kv import gather_pages
from kernels.softmax_attention import attend_with_lse, merge

MAX_TILE = 512  # queries of a window tile


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
    """Causal attention for the query tokens of several spans, concatenated: [T, H, D].

    Args:
        q_THD: queries after RoPE.
        kv_row_H: int64, row of each query head's KV head in the cache.
        k_cache, v_cache: [P, N, K, D]; the spans' own keys and values are already stored.
        block_tables_SB: int64 pages by logical block.
        query_starts: int64 [S + 1], offsets of the spans in q_THD.
        context_lens_S: int64, position of each span's last query + 1.
        scale: factor on q·k.
    """
    _check(q_THD, kv_row_H, k_cache, v_cache, block_tables_SB, query_starts, context_lens_S)
    out_THD = torch.empty_like(q_THD)
    for rows, context, table_B in _spans(query_starts, context_lens_S, block_tables_SB):
        for kv_row, heads in heads_by_row(kv_row_H):
            k_SD, v_SD = _context(k_cache, v_cache, kv_row, table_B, 0, context)
            q_GTD = q_THD[rows, heads].transpose(0, 1)
            out_THD[rows, heads] = _causal(q_GTD, k_SD, v_SD, scale).transpose(0, 1)
    return out_THD


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
    """Attention to the last `window` tokens and the first `sinks`, arguments as `prefill_dense`.

    A query at position m sees j <= m with m - j < window or j < sinks. Pages that no query of the
    span can see may be gone (0 in the table).
    """
    _check(q_THD, kv_row_H, k_cache, v_cache, block_tables_SB, query_starts, context_lens_S)
    out_THD = torch.empty_like(q_THD)
    for rows, context, table_B in _spans(query_starts, context_lens_S, block_tables_SB):
        first = context - (rows.stop - rows.start)
        split = rows.start + min(max(window - first, 0), rows.stop - rows.start)
        for kv_row, heads in heads_by_row(kv_row_H):
            if split > rows.start:  # queries that still see everything
                early = slice(rows.start, split)
                seen = first + split - rows.start
                k_SD, v_SD = _context(k_cache, v_cache, kv_row, table_B, 0, seen)
                q_GTD = q_THD[early, heads].transpose(0, 1)
                out_THD[early, heads] = _causal(q_GTD, k_SD, v_SD, scale).transpose(0, 1)
            if split < rows.stop:
                late = slice(split, rows.stop)
                begin = context - (rows.stop - split)
                lowest = begin - window + 1
                k_SD, v_SD = _context(k_cache, v_cache, kv_row, table_B, lowest, context)
                sink_k, sink_v = _context(k_cache, v_cache, kv_row, table_B, 0, min(sinks, context))
                q_GTD = q_THD[late, heads].transpose(0, 1)
                tiles = _window_tiles(q_GTD, k_SD, v_SD, window, scale)
                far = _far_sinks(q_GTD, sink_k, sink_v, begin, window, scale)
                out_THD[late, heads] = merge([tiles, far] if far else [tiles]).transpose(0, 1)
    return out_THD


def _causal(q_GTD: Tensor, k_SD: Tensor, v_SD: Tensor, scale: float) -> Tensor:
    """The last T of S positions attend causally to all S: [G, T, D]."""
    queries = q_GTD.shape[1]
    prefix = k_SD.shape[0] - queries
    q_ZGTD = q_GTD.unsqueeze(0)
    diagonal = attend_with_lse(q_ZGTD, k_SD[None, prefix:], v_SD[None, prefix:], scale, causal=True)
    if not prefix:
        return diagonal[0][0]
    before = attend_with_lse(q_ZGTD, k_SD[None, :prefix], v_SD[None, :prefix], scale)
    return merge([before, diagonal])[0]


def _window_tiles(
    q_GTD: Tensor, k_SD: Tensor, v_SD: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """T queries over T + window - 1 keys, query t seeing keys [t, t + window): output and lse.

    Tiles of queries overlap in their keys; `unfold` makes that a view, so nothing is copied.
    """
    group, queries, dim = q_GTD.shape
    tile = min(MAX_TILE, max(64, window // 4), queries)
    tiles = -(-queries // tile)
    padding = tiles * tile - queries
    keys = tile + window - 1
    q_GTD = torch.nn.functional.pad(q_GTD, (0, 0, 0, padding))
    k_ZSD, v_ZSD = (
        torch.nn.functional.pad(x_SD, (0, 0, 0, padding)).unfold(0, keys, tile).transpose(1, 2)
        for x_SD in (k_SD, v_SD)
    )
    q_ZGTD = q_GTD.view(group, tiles, tile, dim).transpose(0, 1)
    bias_TS = _window_bias(tile, window, q_GTD.device)
    out, lse = attend_with_lse(q_ZGTD, k_ZSD, v_ZSD, scale, bias_TS=bias_TS)
    out_GTD = out.transpose(0, 1).flatten(1, 2)[:, :queries]
    return out_GTD, lse.transpose(0, 1).flatten(1, 2)[:, :queries]


def _window_bias(tile: int, window: int, device: torch.device) -> Tensor:
    """0 where query t of a tile sees key s (t <= s < t + window), else -inf; float32."""
    offset_TS = torch.arange(tile + window - 1, device=device) - torch.arange(
        tile, device=device
    ).unsqueeze(1)
    seen_TS = (offset_TS >= 0) & (offset_TS < window)
    return torch.zeros(seen_TS.shape, device=device).masked_fill(~seen_TS, float("-inf"))


def _far_sinks(
    q_GTD: Tensor, k_SD: Tensor, v_SD: Tensor, begin: int, window: int, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Attention to the sinks that have left each query's window; lse -inf where none has."""
    sinks = k_SD.shape[0]
    if not sinks:
        return None
    scores_GTS = torch.einsum("gtd,sd->gts", q_GTD, k_SD).float() * scale
    positions = begin + torch.arange(q_GTD.shape[1], device=q_GTD.device)
    near_TS = positions[:, None] - torch.arange(sinks, device=q_GTD.device) < window
    scores_GTS = scores_GTS.masked_fill(near_TS, float("-inf"))
    lse_GT = scores_GTS.logsumexp(-1)
    weights_GTS = (scores_GTS - lse_GT.clamp(min=-1e30)[..., None]).exp()
    return torch.einsum("gts,sd->gtd", weights_GTS, v_SD.float()).to(q_GTD.dtype), lse_GT


def _context(
    k_cache: Tensor, v_cache: Tensor, kv_row: int, table_B: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of positions [start, stop) of one KV head: [stop - start, D] each."""
    block_tokens = k_cache.shape[2]
    first = start // block_tokens
    pages_B = table_B[first : -(-stop // block_tokens)]
    offset = first * block_tokens
    k_SD, v_SD = (gather_pages(cache, kv_row, pages_B) for cache in (k_cache, v_cache))
    return k_SD[start - offset : stop - offset], v_SD[start - offset : stop - offset]


def _spans(
    query_starts: Tensor, context_lens_S: Tensor, block_tables_SB: Tensor
) -> Iterator[tuple[slice, int, Tensor]]:
    """Rows of each span among the queries, its context length, and its block table."""
    starts = query_starts.tolist()
    for span, context in enumerate(context_lens_S.tolist()):
        if starts[span] < starts[span + 1]:
            yield slice(starts[span], starts[span + 1]), context, block_tables_SB[span]


def _check(
    q_THD: Tensor,
    kv_row_H: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_SB: Tensor,
    query_starts: Tensor,
    context_lens_S: Tensor,
) -> None:
    check_shapes(
        {"S+1": context_lens_S.shape[0] + 1},
        q=(q_THD, "T H D"),
        kv_row=(kv_row_H, "H"),
        k_cache=(k_cache, "P N K D"),
        v_cache=(v_cache, "P N K D"),
        context_lens=(context_lens_S, "S"),
        block_tables=(block_tables_SB, "S B"),
        query_starts=(query_starts, "S+1"),
    )
