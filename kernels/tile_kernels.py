"""Triton kernels of sparse prefill: block masses, shares, lists of kept blocks, attention to them.

    tile_masses      log2 mass of every block for each sampled query of a tile
    tile_shares      from these, a block's largest share among the tile's queries
    list_blocks      from a mask of blocks, the kept ones in order and their number
    list_attention   a tile's queries attend to the blocks of its list

Index letters: q sampled queries of a tile, m queries, n keys of a page, b blocks, i index
dimensions, d head dimensions. The door is `kernels.device_sparse_prefill`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.span_attention import attend_page

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_masses(
    qi_ptr,
    index_rows,
    keys_ptr,
    scales_ptr,
    tables,
    span_of,
    sampled,
    positions,
    masses_ptr,
    qi_row,
    qi_head,
    table_row,
    cache_rows,
    heads,
    width,
    DIM: tl.constexpr,
    SAMPLED: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A run of BLOCKS blocks for one tile and head; log2 of masses [Z, H, Q, B].

    SCALED: keys are int8, and each has a scale of its own.
    """
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.program_id(2) * BLOCKS
    q = tl.arange(0, SAMPLED)
    i = tl.arange(0, DIM)
    n = tl.arange(0, KEYS)
    row = tl.load(sampled + tile * SAMPLED + q).to(tl.int64)
    position = tl.load(positions + row).to(tl.int32)
    x = tl.load(qi_ptr + row[:, None] * qi_row + head * qi_head + i[None, :])
    index_row = tl.load(index_rows + head).to(tl.int64)
    pages = tables + tl.load(span_of + tile).to(tl.int64) * table_row
    stop = tl.minimum(first + BLOCKS, tl.max(position, 0) // KEYS + 1)
    for block in tl.range(first, stop, num_stages=STAGES):
        page = tl.load(pages + block).to(tl.int64)
        at = (page * cache_rows + index_row) * KEYS
        k = tl.load(keys_ptr + (at + n[:, None]) * DIM + i[None, :])
        s = tl.dot(x, tl.trans(k.to(x.dtype)), input_precision="ieee")
        if SCALED:
            s *= tl.load(scales_ptr + at + n).to(tl.float32)[None, :]
        s = tl.where(block * KEYS + n[None, :] <= position[:, None], s, float("-inf"))
        peak = tl.max(s, 1)
        base = tl.where(peak == float("-inf"), 0.0, peak * LOG2_E)
        total = tl.sum(tl.exp2(s * LOG2_E - base[:, None]), 1)  # at least 1 if a key is seen
        mass = tl.where(total > 0.0, base + tl.log2(tl.maximum(total, 0.5)), float("-inf"))
        tl.store(masses_ptr + ((tile * heads + head) * SAMPLED + q) * width + block, mass)


@triton.jit
def tile_shares(
    masses_ptr,
    last_positions,
    shares_ptr,
    heads,
    width,
    SAMPLED: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Natural log of shares [Z, H, B] of one tile and head, -inf past its last block."""
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    q = tl.arange(0, SAMPLED)
    b = tl.arange(0, BLOCKS)
    blocks = tl.load(last_positions + tile).to(tl.int32) // KEYS + 1
    rows = masses_ptr + ((tile * heads + head) * SAMPLED + q[:, None]) * width
    peak = tl.full((SAMPLED,), float("-inf"), tl.float32)
    total = tl.zeros((SAMPLED,), tl.float32)
    for start in tl.range(0, blocks, BLOCKS):
        at = start + b[None, :]
        mass = tl.load(rows + at, mask=at < blocks, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(mass, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(mass - base[:, None]), 1)
        peak = higher
    log_total = peak + tl.log2(total)
    for start in tl.range(0, width, BLOCKS):
        at = start + b[None, :]
        mass = tl.load(rows + at, mask=at < blocks, other=float("-inf"))
        share = tl.max(mass - log_total[:, None], 0) / LOG2_E
        tl.store(
            shares_ptr + (tile * heads + head) * width + start + b, share, mask=start + b < width
        )


@triton.jit
def list_blocks(mask_ptr, blocks_ptr, counts_ptr, heads, width, BLOCKS: tl.constexpr):
    """Kept blocks of one tile and head, ascending, and their number."""
    at = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    b = tl.arange(0, BLOCKS)
    count = 0
    for start in tl.range(0, width, BLOCKS):
        kept = tl.load(mask_ptr + at * width + start + b, mask=start + b < width, other=0).to(
            tl.int32
        )
        place = count + tl.cumsum(kept, 0) - 1
        tl.store(blocks_ptr + at * width + place, start + b, mask=kept != 0)
        count += tl.sum(kept, 0)
    tl.store(counts_ptr + at, count)


@triton.jit
def list_attention(
    q_ptr,
    out_ptr,
    heads,
    kv_rows,
    k_desc,
    v_desc,
    tables,
    span_of,
    begins,
    ends,
    last_positions,
    blocks_ptr,
    counts,
    group,
    q_row,
    q_head,
    out_row,
    out_head,
    table_row,
    cache_heads,
    width,
    scale_log2,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """QUERIES of a tile's queries, one head; tiles x (TILE / QUERIES) x group programs."""
    program = tl.program_id(0)
    member = program % group
    part = tl.num_programs(0) // group - 1 - program // group  # long contexts first
    tile = (part // (TILE // QUERIES)).to(tl.int64)
    begin = tl.load(begins + tile).to(tl.int32) + part % (TILE // QUERIES) * QUERIES
    end = tl.load(ends + tile).to(tl.int32)
    if begin >= end:
        return
    last = tl.load(last_positions + tile).to(tl.int32)
    head = tl.load(heads + member).to(tl.int64)
    kv_row = tl.load(kv_rows + member).to(tl.int32)
    pages = tables + tl.load(span_of + tile).to(tl.int64) * table_row
    blocks = blocks_ptr + (tile * group + member) * width
    count = tl.load(counts + tile * group + member)

    t = begin + tl.arange(0, QUERIES)
    d = tl.arange(0, DIM)
    token = t.to(tl.int64)[:, None]
    q = tl.load(q_ptr + token * q_row + head * q_head + d, mask=(t < end)[:, None], other=0.0)
    position_m = tl.minimum(last - end + 1 + t, last)

    acc = tl.zeros((QUERIES, DIM), tl.float32)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    # Only a tile's own blocks, which end its list, can hold keys that a query may not see.
    whole = tl.maximum(count - (TILE // KEYS + 1), 0)
    for entry in tl.range(whole, count, num_stages=1):
        block = tl.load(blocks + entry)
        row = (tl.load(pages + block).to(tl.int32) * cache_heads + kv_row) * KEYS
        acc, peak, total = attend_page(
            acc, peak, total, q, k_desc, v_desc, row, block, position_m, last + 1, 0,
            last + 1, 0, scale_log2, True, KEYS, PRECISION,
        )  # fmt: skip
    for entry in tl.range(0, whole, num_stages=STAGES):
        block = tl.load(blocks + entry)
        row = (tl.load(pages + block).to(tl.int32) * cache_heads + kv_row) * KEYS
        acc, peak, total = attend_page(
            acc, peak, total, q, k_desc, v_desc, row, block, position_m, last + 1, 0,
            last + 1, 0, scale_log2, False, KEYS, PRECISION,
        )  # fmt: skip

    acc = acc / total[:, None]
    target = out_ptr + token * out_row + head * out_head + d
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=(t < end)[:, None])
