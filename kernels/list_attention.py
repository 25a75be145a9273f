"""The Triton kernel of sparse prefill attention: a tile's queries read the blocks of their list.

The pages of a list are attended as in `kernels.span_attention`. Lists ascend, so only a tile's last
entries, its own blocks, need a mask; they come first here, and the others run in a loop of their
own.

Index letters: m queries, n keys of a page, d head dimensions. The door is
`kernels.device_sparse_prefill`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.span_attention import attend_page


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
