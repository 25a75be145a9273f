"""Triton kernels that score blocks for tiles of prefill queries: `score_tiles`.

    tile_masses      log2 mass of every block for each sampled query of a tile
    tile_shares      from these, a block's largest share among the tile's queries

Keys are read once for all sampled queries of a tile. A program scores a run of blocks and leaves
its sum, from which the second kernel knows the mass of all keys.

Shapes: Z tiles, H heads, B blocks of a table, Q sampled queries of a tile, R runs of blocks that
one program scores. Index letters: q sampled queries, n keys of a page, b blocks, r runs, i index
dimensions. The door is `kernels.device_sparse_prefill`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.block_age import AGE_RANGES

LOG2_E = tl.constexpr(1.4426950408889634)
AGES = tl.constexpr(AGE_RANGES)


@triton.jit
def key_scores(x, keys_ptr, scales_ptr, key, i, SCALED: tl.constexpr):
    """Scores of a block's keys, by query."""
    k = tl.load(keys_ptr + key[:, None] * i.shape[0] + i[None, :])
    s = tl.dot(x, tl.trans(k.to(x.dtype)), input_precision="ieee")
    if SCALED:
        s *= tl.load(scales_ptr + key).to(tl.float32)[None, :]
    return s


@triton.jit
def age_bias(biases, age):
    """log2 of what queries multiply a block's mass by that lies `age` blocks before their own."""
    # The number of bits of an age is the exponent of the float, which is exact for so few blocks.
    bits = (age.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    return tl.load(biases + tl.minimum(tl.maximum(bits, 0), AGES - 1)) * LOG2_E


@triton.jit
def block_mass(s, key_position, position, base, bias, SHOWN: tl.constexpr):
    """Weights of a block's keys, summed by query: relative to 2^base, which this block may raise.

    All of them are multiplied by 2^bias. SHOWN: every query sees all of them. Returns log2 of the
    masses, the sums, and the base.
    """
    if not SHOWN:
        s = tl.where(key_position[None, :] <= position[:, None], s, float("-inf"))
    base = tl.maximum(base, tl.max(s, 1) * LOG2_E + bias)
    origin = base if SHOWN else tl.where(base == float("-inf"), 0.0, base)
    total = tl.sum(tl.exp2(s * LOG2_E - (origin - bias)[:, None]), 1)
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
    biases_ptr,
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
    BIASED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A run of BLOCKS blocks for one tile and head: log2 of masses [Z, H, B, Q], and of their sum
    over the run [Z, H, R, Q].

    SCALED: keys are int8, and each has a scale of its own. BIASED: heads have a bias by age.
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
    own = position // KEYS
    biases = biases_ptr + head * AGES
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
        bias = age_bias(biases, own - block) if BIASED else 0.0
        before = base
        mass, total, base = block_mass(s, block * KEYS + n, position, base, bias, True)
        sums = sums * tl.exp2(before - base) + total
        tl.store(masses + block * SAMPLED, mass)
    for block in tl.range(shown, stop, num_stages=1):
        page = tl.load(pages + block).to(tl.int64)
        key = (page * cache_rows + index_row) * KEYS + n
        s = key_scores(x, keys_ptr, scales_ptr, key, i, SCALED)
        bias = age_bias(biases, own - block) if BIASED else 0.0
        before = base
        mass, total, base = block_mass(s, block * KEYS + n, position, base, bias, False)
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
