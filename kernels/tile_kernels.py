"""Triton kernels of sparse prefill: block masses, shares, lists of chosen blocks, attention.

    tile_masses      log2 mass of every block for each sampled query of a tile
    tile_shares      from these, a block's largest share among the tile's queries
    choose_blocks    top-p over a tile's shares: its blocks in order and their number
    list_attention   a tile's queries attend to the blocks of its list

Index letters: q sampled queries of a tile, m queries, n keys of a page, b blocks, r runs of blocks
that one program scores, i index dimensions, d head dimensions. The door is
`kernels.device_sparse_prefill`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import reference
from kernels.span_attention import attend_page

LOG2_E = tl.constexpr(1.4426950408889634)
BINS = tl.constexpr(reference.BINS)
BINS_PER_NAT = tl.constexpr(float(reference.BINS_PER_NAT))
MASS_UNIT = tl.constexpr(reference.MASS_UNIT)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32


@triton.jit
def key_scores(x, keys_ptr, scales_ptr, key, i, SCALED: tl.constexpr):
    """Scores of a block's keys, by query."""
    k = tl.load(keys_ptr + key[:, None] * i.shape[0] + i[None, :])
    s = tl.dot(x, tl.trans(k.to(x.dtype)), input_precision="ieee")
    if SCALED:
        s *= tl.load(scales_ptr + key).to(tl.float32)[None, :]
    return s


@triton.jit
def block_mass(s, key_position, position, base, SHOWN: tl.constexpr):
    """Weights of a block's keys, summed by query: relative to 2^base, which this block may raise.

    SHOWN: every query sees all of them. Returns log2 of the masses, the sums, and the base.
    """
    if not SHOWN:
        s = tl.where(key_position[None, :] <= position[:, None], s, float("-inf"))
    base = tl.maximum(base, tl.max(s, 1) * LOG2_E)
    origin = base if SHOWN else tl.where(base == float("-inf"), 0.0, base)
    total = tl.sum(tl.exp2(s * LOG2_E - origin[:, None]), 1)
    # 126 below what came before, nothing is left of it: no selection would take it.
    seen = total > 0.0
    mass = tl.where(seen, origin + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    return mass, total, base


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
    totals_ptr,
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
    """A run of BLOCKS blocks for one tile and head: log2 of masses [Z, H, B, Q], and of their sum
    over the run [Z, H, R, Q].

    SCALED: keys are int8, and each has a scale of its own.
    """
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    run = tl.program_id(2)
    first = run * BLOCKS
    q = tl.arange(0, SAMPLED)
    i = tl.arange(0, DIM)
    n = tl.arange(0, KEYS)
    row = tl.load(sampled + tile * SAMPLED + q).to(tl.int64)
    position = tl.load(positions + row).to(tl.int32)
    x = tl.load(qi_ptr + row[:, None] * qi_row + head * qi_head + i[None, :])
    index_row = tl.load(index_rows + head).to(tl.int64)
    pages = tables + tl.load(span_of + tile).to(tl.int64) * table_row
    at = tile * heads + head
    masses = masses_ptr + at * width * SAMPLED + q
    base = tl.full((SAMPLED,), float("-inf"), tl.float32)
    sums = tl.zeros((SAMPLED,), tl.float32)
    stop = tl.minimum(first + BLOCKS, tl.max(position, 0) // KEYS + 1)
    shown = tl.minimum(stop, tl.maximum(first, (tl.min(position, 0) + 1) // KEYS))
    for block in tl.range(first, shown, num_stages=STAGES):
        page = tl.load(pages + block).to(tl.int64)
        key = (page * cache_rows + index_row) * KEYS + n
        s = key_scores(x, keys_ptr, scales_ptr, key, i, SCALED)
        before = base
        mass, total, base = block_mass(s, block * KEYS + n, position, base, True)
        sums = sums * tl.exp2(before - base) + total
        tl.store(masses + block * SAMPLED, mass)
    for block in tl.range(shown, stop, num_stages=1):
        page = tl.load(pages + block).to(tl.int64)
        key = (page * cache_rows + index_row) * KEYS + n
        s = key_scores(x, keys_ptr, scales_ptr, key, i, SCALED)
        before = base
        mass, total, base = block_mass(s, block * KEYS + n, position, base, False)
        sums = sums * tl.where(before == base, 1.0, tl.exp2(before - base)) + total
        tl.store(masses + block * SAMPLED, mass)
    seen = sums > 0.0
    log_sum = tl.where(seen, base + tl.log2(tl.where(seen, sums, 1.0)), float("-inf"))
    tl.store(totals_ptr + (at * tl.num_programs(2) + run) * SAMPLED + q, log_sum)


@triton.jit
def tile_shares(
    masses_ptr,
    totals_ptr,
    last_positions,
    shares_ptr,
    heads,
    width,
    runs,
    SAMPLED: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCKS: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Natural log of BLOCKS shares [Z, H, B] of one tile and head, -inf past its last block."""
    tile = tl.program_id(0).to(tl.int64)
    at = tile * heads + tl.program_id(1)
    q = tl.arange(0, SAMPLED)
    r = tl.arange(0, RUNS)[:, None]
    b = tl.program_id(2) * BLOCKS + tl.arange(0, BLOCKS)
    blocks = tl.load(last_positions + tile).to(tl.int32) // KEYS + 1
    log_sums = tl.load(
        totals_ptr + (at * runs + r) * SAMPLED + q[None, :], mask=r < runs, other=float("-inf")
    )
    peak = tl.max(log_sums, 0)
    log_total = peak + tl.log2(tl.sum(tl.exp2(log_sums - peak[None, :]), 0))
    mass = tl.load(
        masses_ptr + (at * width + b[:, None]) * SAMPLED + q[None, :],
        mask=b[:, None] < blocks,
        other=float("-inf"),
    )
    share = tl.max(mass - log_total[None, :], 1) / LOG2_E
    tl.store(shares_ptr + at * width + b, share, mask=b < width)


@triton.jit
def load_shares(shares, b, blocks):
    """Log shares of blocks; what is not finite has none, nor what is past the end."""
    share = tl.load(shares + b, mask=b < blocks, other=float("-inf"))
    return tl.where(tl.abs(share) <= LARGEST, share, float("-inf"))


@triton.jit
def choose_blocks(
    shares_ptr,
    top_p_ptr,
    span_of,
    first_positions,
    last_positions,
    dense_from,
    blocks_ptr,
    counts_ptr,
    heads,
    width,
    dense_below,
    KEYS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Chosen blocks of one tile and head, ascending, and their number: `select_tiles`.

    The threshold is the first bin up to which the masses reach the share that is wanted. Four times
    the bins that may be it are cut into four, and masses are summed up to the three cuts: there is
    no histogram to keep, and threads add up nothing but whole numbers.
    """
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tile * heads + head
    shares = shares_ptr + at * width
    last = tl.load(last_positions + tile).to(tl.int32)
    own = tl.load(first_positions + tile).to(tl.int32) // KEYS
    blocks = last // KEYS + 1
    is_dense = (last >= tl.load(dense_from + tl.load(span_of + tile))) | (last + 1 < dense_below)
    top_p = tl.load(top_p_ptr + head)
    b = tl.arange(0, BLOCKS)

    high = tl.full((BLOCKS,), -LARGEST, tl.float32)
    for start in tl.range(0, blocks, BLOCKS):
        high = tl.maximum(high, load_shares(shares, start + b, blocks))
    most = tl.max(high, 0)
    threshold = 0
    wanted = tl.zeros((), tl.float64)
    for cut in tl.static_range(4):
        step = BINS // 4 >> 2 * cut
        total = tl.zeros((BLOCKS,), tl.int64)
        one = tl.zeros((BLOCKS,), tl.int64)
        two = tl.zeros((BLOCKS,), tl.int64)
        three = tl.zeros((BLOCKS,), tl.int64)
        for start in tl.range(0, blocks, BLOCKS):
            below = most - load_shares(shares, start + b, blocks)
            bin = tl.minimum(below * BINS_PER_NAT, BINS - 1).to(tl.int32)
            mass = tl.exp(-below) * MASS_UNIT
            # To the nearest whole number: beyond 2^23 there are no others.
            mass = tl.where(mass < 8388608.0, (mass + 8388608.0) - 8388608.0, mass).to(tl.int64)
            total += mass
            one += tl.where(bin < threshold + step, mass, 0)
            two += tl.where(bin < threshold + 2 * step, mass, 0)
            three += tl.where(bin < threshold + 3 * step, mass, 0)
        if cut == 0:
            wanted = top_p.to(tl.float64) * tl.sum(total, 0).to(tl.float64)
        passed = (tl.sum(one, 0).to(tl.float64) < wanted).to(tl.int32)
        passed += (tl.sum(two, 0).to(tl.float64) < wanted).to(tl.int32)
        passed += (tl.sum(three, 0).to(tl.float64) < wanted).to(tl.int32)
        threshold += passed * step
    threshold = tl.where(top_p >= 1.0, BINS - 1, threshold)

    count = 0
    for start in tl.range(0, blocks, BLOCKS):
        block = start + b
        below = most - load_shares(shares, block, blocks)
        bin = tl.minimum(below * BINS_PER_NAT, BINS - 1).to(tl.int32)
        is_kept = (bin <= threshold) | (block == 0) | (block >= own - 1) | is_dense
        kept = (is_kept & (block < blocks)).to(tl.int32)
        place = count + tl.cumsum(kept, 0) - 1
        tl.store(blocks_ptr + at * width + place, block, mask=kept != 0)
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
