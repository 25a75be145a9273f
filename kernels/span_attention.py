"""The Triton kernel of prefill attention: window and sinks, or everything before a query, paged.

One program computes a tile of queries of one head. A tile of keys is a page, which one TMA load
brings in (plain loads before Hopper). The sinks are extra first tiles; only tiles at an edge
(sinks, far end of the window, diagonal) are masked, the others run in a loop of their own.

Programs of a tile's heads stand side by side, so that heads of one KV head find its pages in the
L2 cache, and tiles are taken last first: the longest contexts start first.

Index letters: m queries of a tile, n keys of a page. The door is `kernels.prefill_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _span_of(tile, query_starts, spans, QUERIES: tl.constexpr, SPANS: tl.constexpr):
    """Span of the tile, and the tile's number in it; span = spans past the last tile."""
    s = tl.arange(0, SPANS)
    begin = tl.load(query_starts + s, mask=s < spans, other=0).to(tl.int32)
    end = tl.load(query_starts + s + 1, mask=s < spans, other=0).to(tl.int32)
    tiles = (end - begin + QUERIES - 1) // QUERIES
    span = tl.sum(((tl.cumsum(tiles, 0) <= tile) & (s < spans)).to(tl.int32), 0)
    return span, tile - tl.sum(tl.where(s < span, tiles, 0), 0)


@triton.jit
def attend_page(
    acc,
    peak,
    total,
    q,
    k_desc,
    v_desc,
    row,
    block,
    position_m,
    context,
    lowest,
    window,
    sinks,
    scale_log2,
    EDGE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over the keys of one page, whose rows start at `row` of the caches."""
    k = k_desc.load([row, 0])
    s = tl.dot(q, k.T, input_precision=PRECISION)
    v = v_desc.load([row, 0])
    if EDGE:
        n = block * KEYS + tl.arange(0, KEYS)
        away = position_m[:, None] - n[None, :]
        seen = (away >= 0) & ((away < window) | (n < sinks)[None, :])
        s = tl.where(seen, s, float("-inf"))
        # What nobody sees may be anything, NaN too, and 0 * NaN is not 0.
        held = (n < context) & ((n >= lowest) | (n < sinks))
        v = tl.where(held[:, None], v, 0.0).to(v.dtype)
    higher = tl.maximum(peak, tl.max(s, 1) * scale_log2)
    base = tl.where(higher == float("-inf"), 0.0, higher) if EDGE else higher
    p = tl.exp2(s * scale_log2 - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, higher, total


@triton.jit(do_not_specialize=["spans", "tiles", "group", "table_row", "window", "sinks"])
def span_attention(
    q_ptr,
    out_ptr,
    heads,
    kv_rows,
    k_desc,
    v_desc,
    tables,
    query_starts,
    context_lens,
    spans,
    tiles,
    group,
    q_row,
    q_head,
    out_row,
    out_head,
    table_row,
    cache_heads,
    window,
    sinks,
    scale_log2,
    DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SPANS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of queries of one head; `tiles` x `group` programs, of which some may find no span."""
    program = tl.program_id(0)
    member = program % group
    span, tile = _span_of(tiles - 1 - program // group, query_starts, spans, QUERIES, SPANS)
    if span >= spans:
        return
    begin = tl.load(query_starts + span).to(tl.int32)
    end = tl.load(query_starts + span + 1).to(tl.int32)
    context = tl.load(context_lens + span).to(tl.int32)
    head = tl.load(heads + member).to(tl.int64)
    kv_row = tl.load(kv_rows + member).to(tl.int32)
    pages = tables + span.to(tl.int64) * table_row

    t = begin + tile * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, DIM)
    token = t.to(tl.int64)[:, None]
    q = tl.load(q_ptr + token * q_row + head * q_head + d, mask=(t < end)[:, None], other=0.0)

    first = context - end + begin + tile * QUERIES
    last = tl.minimum(first + QUERIES, context) - 1
    position_m = tl.minimum(first + tl.arange(0, QUERIES), last)  # rows past the end repeat one
    lowest = tl.maximum(first - window + 1, 0)
    # Blocks [start, left) are at the far edge of the window, [right, stop) at the diagonal.
    start, stop = lowest // KEYS, last // KEYS + 1
    left = tl.minimum((tl.maximum(last - window + 1, 0) + KEYS - 1) // KEYS, stop)
    right = tl.maximum((first + 1) // KEYS, left)
    sink_blocks = tl.minimum((sinks + KEYS - 1) // KEYS, start)
    before_diagonal = sink_blocks + left - start

    acc = tl.zeros((QUERIES, DIM), tl.float32)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for step in tl.range(0, before_diagonal + stop - right, num_stages=1):
        block = tl.where(step < sink_blocks, step, step - sink_blocks + start)
        block = tl.where(step < before_diagonal, block, step - before_diagonal + right)
        row = (tl.load(pages + block).to(tl.int32) * cache_heads + kv_row) * KEYS
        acc, peak, total = attend_page(
            acc, peak, total, q, k_desc, v_desc, row, block, position_m, context, lowest,
            window, sinks, scale_log2, True, KEYS, PRECISION,
        )  # fmt: skip
    for block in tl.range(left, right, num_stages=STAGES):
        row = (tl.load(pages + block).to(tl.int32) * cache_heads + kv_row) * KEYS
        acc, peak, total = attend_page(
            acc, peak, total, q, k_desc, v_desc, row, block, position_m, context, lowest,
            window, sinks, scale_log2, False, KEYS, PRECISION,
        )  # fmt: skip

    acc = acc / total[:, None]
    target = out_ptr + token * out_row + head * out_head + d
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=(t < end)[:, None])
