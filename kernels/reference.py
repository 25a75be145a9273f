"""The specification: every attention op in plain PyTorch, one token and one head at a time.

Each module of fast ops has one beside it that defines them, under the same names and signatures;
tests compare the two. This module is all of the specification under one name:

    paged_kv_reference         store_kv, quantise_index_keys, store_index_keys
    indexer_reference          project_index, score_blocks, select_blocks, count_attended
    decode_reference           decode_sparse, decode_windowed, decode_dense
    prefill_reference          prefill_windowed, prefill_dense
    prefill_sparse_reference   score_tiles, select_tiles, prefill_sparse

All arithmetic is float32. Shapes, here and in what refers to this module:

    T tokens, S prefill spans, R decode rows (one query token each), H query heads of the call,
    N KV heads in the cache, D head_dim, I index_dim, P pages, K tokens of a page (block),
    B block-table width in logical blocks, A ranges of blocks' ages, Z tiles of prefill queries,
    Q sampled queries of a tile

A cache is [P, N, K, D]; page 0 is the null page that padding points to. Block tables are int64,
indexed by logical block. `kv_row_H` gives each query head its row among the N cached KV heads.
"""

from __future__ import annotations

from kernels.decode_reference import decode_dense, decode_sparse, decode_windowed
from kernels.indexer_reference import (
    BINS,
    BINS_PER_NAT,
    MASS_UNIT,
    count_attended,
    project_index,
    score_blocks,
    select_blocks,
)
from kernels.paged_kv_reference import INDEX_STEPS, quantise_index_keys, store_index_keys, store_kv
from kernels.prefill_reference import prefill_dense, prefill_windowed
from kernels.prefill_sparse_reference import prefill_sparse, score_tiles, select_tiles

__all__ = [
    "BINS",
    "BINS_PER_NAT",
    "INDEX_STEPS",
    "MASS_UNIT",
    "count_attended",
    "decode_dense",
    "decode_sparse",
    "decode_windowed",
    "prefill_dense",
    "prefill_sparse",
    "prefill_windowed",
    "project_index",
    "quantise_index_keys",
    "score_blocks",
    "score_tiles",
    "select_blocks",
    "select_tiles",
    "store_index_keys",
    "store_kv",
]
