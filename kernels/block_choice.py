"""The Triton kernel that chooses each tile's blocks by top-p: `select_tiles`, as lists.

The rule is that of `kernels.reference.select_blocks`, its bins and whole masses included. Shapes:
shares float32 [Z, H, B] of Z tiles, H heads and B blocks of a table; chosen blocks int32 [Z, H, B],
of which the first `counts` [Z, H] are written. Index letter: b blocks that one program looks at
together. The door is `kernels.device_sparse_prefill`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import reference

BINS = tl.constexpr(reference.BINS)
BINS_PER_NAT = tl.constexpr(float(reference.BINS_PER_NAT))
MASS_UNIT = tl.constexpr(reference.MASS_UNIT)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32


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
