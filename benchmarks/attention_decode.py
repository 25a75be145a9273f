"""Decode attention of one layer: the CUDA kernels beside dense attention, in one run.

Shape: a layer of Qwen3-30B-A3B (32 query heads, 4 KV heads, head_dim 128, bfloat16), window 8192,
4 sinks, blocks of 64, five retrieval heads spread over all KV heads (so every KV head is full).
`benchmarks.decode_layers` has the recipe of the keys, `benchmarks.dense_decode` dense attention.

Times are medians of CUDA graph replays, per layer. Index keys are bfloat16, and once more the same
in 8 bits ("int8", with a scale per token: 18 bytes instead of 32). "floor" is the bytes that must
be read by the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.attention_layer import BLOCK, DIM, INDEX_DIM, KV_HEADS
from benchmarks.decode_layers import RULE, Stack, index_bytes
from benchmarks.dense_decode import dense_microseconds
from benchmarks.flashinfer_peer import FlashInfer
from kernels._launch import KernelLibrary
from kernels.decode_workspace import DecodeWorkspace

SHARES = (0.01, 0.03, 0.1)
INT8_BYTES = INDEX_DIM + 2  # of a key, with its scale


def records(
    library: KernelLibrary,
    shapes: Sequence[tuple[int, int]],
    bandwidth: float,
    peer: FlashInfer | None,
) -> Iterator[dict[str, Any]]:
    """Figures of all shares at each (rows, context), as they are there.

    Args:
        bandwidth: of a copy, bytes read and written per second.
        peer: FlashInfer, where it runs.
    """
    for rows, context in shapes:
        start = time.monotonic()
        dense = dense_microseconds(rows, context, peer)
        for share in SHARES:
            torch.cuda.empty_cache()
            sparse = sparse_figures(library, rows, context, share, bandwidth)
            yield {
                "rows": rows,
                "context": context,
                "share": share,
                "dense": dense,
                "sparse": sparse,
                **ratios(dense, sparse),
                "seconds": time.monotonic() - start,
            }
            start = time.monotonic()


def ratios(dense: dict[str, float], sparse: dict[str, Any]) -> dict[str, Any]:
    """How much faster than the fastest dense attention; None where there was none."""
    if not dense:
        return {"fastest_dense": None, "ratio": None, "int8_ratio": None}
    fastest = min(dense, key=dense.__getitem__)
    return {
        "fastest_dense": fastest,
        "ratio": dense[fastest] / sparse["microseconds"],
        "int8_ratio": dense[fastest] / sparse["int8"]["microseconds"],
    }


def blocks_needed(space: DecodeWorkspace, rows: int, context: int, tiles: int) -> int:
    """Blocks of all rows and KV heads that some head attends to, each once."""
    block_RGB = space.lists.view(rows, tiles, context // BLOCK, 2)[..., 0]
    counts_RG1 = space.list_counts.view(rows, tiles, 1)
    listed_RGB = torch.arange(context // BLOCK, device="cuda") < counts_RG1
    first = max(0, context - RULE.window) // BLOCK
    outside_RGB = (block_RGB > 0) & (block_RGB < first)
    window = context // BLOCK - first + (first > 0)
    return int((listed_RGB & outside_RGB).sum()) + rows * KV_HEADS * window


def sparse_figures(
    library: KernelLibrary, rows: int, context: int, share: float, bandwidth: float
) -> dict[str, Any]:
    """Both kernels, each alone and together, with the bytes that they must read.

    Attention also in its parts: local heads alone, and retrieval heads with lists made before.
    """
    stack = Stack.make(library, rows, context, share)
    both = stack.microseconds(Stack.whole)
    needed = partial(blocks_needed, rows=rows, context=context, tiles=stack.tiles.count)
    kv_bytes = statistics.fmean(map(needed, stack.spaces)) * BLOCK * DIM * 4
    rounded = stack.with_int8_keys()
    int8_us, int8_select_us = (rounded.microseconds(c) for c in (Stack.whole, Stack.select))
    select_us, attention_us = (stack.microseconds(c) for c in (Stack.select, Stack.attention))
    local, retrieval = (stack.of_role(retrieval=flag) for flag in (False, True))
    local_us = local.microseconds(Stack.attention)
    retrieval.each(Stack.select)
    retrieval_us = retrieval.microseconds(Stack.attention)
    attended = [float(layer.attended_RS.float().mean()) for layer in stack.layers]
    bf16_bytes, int8_bytes = (index_bytes(rows, context, n) for n in (2 * INDEX_DIM, INT8_BYTES))

    def share_of_copy(moved: float, microseconds: float) -> float:
        return moved / (1e-6 * microseconds) / bandwidth

    return {
        "microseconds": both,
        "select_microseconds": select_us,
        "attention_microseconds": attention_us,
        "local_microseconds": local_us,
        "retrieval_microseconds": retrieval_us,
        "attended_fraction": statistics.fmean(attended) / context,
        "floor_microseconds": 1e6 * (bf16_bytes + kv_bytes) / bandwidth,
        "select_share_of_copy": share_of_copy(bf16_bytes, select_us),
        "attention_share_of_copy": share_of_copy(kv_bytes, attention_us),
        "int8": {
            "microseconds": int8_us,
            "select_microseconds": int8_select_us,
            "select_share_of_copy": share_of_copy(int8_bytes, int8_select_us),
            "floor_microseconds": 1e6 * (int8_bytes + kv_bytes) / bandwidth,
        },
    }
