"""Door of the CUDA prefill kernel (`csrc/span_prefill.cu`): compute capability 9.0 only.

It is the fast one of two: windowed heads and lists of blocks reach the speed of dense attention
with it. Everywhere else `kernels.prefill_triton` computes the same.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._args import Table, pointer
from kernels._launch import KernelLibrary
from kernels.span_inputs import EVERYTHING, SpanInputs

TILE = 128  # queries
BLOCK = 64  # tokens of a page


class SpanArgs(ctypes.Structure):
    """Arguments of `span_prefill`; what each means stands in `csrc/span_args.h`."""

    _fields_ = [
        ("queries", c_void_p),
        ("query_row_stride", c_int64),
        ("query_head_stride", c_int64),
        ("out", c_void_p),
        ("out_row_stride", c_int64),
        ("out_head_stride", c_int64),
        ("heads", c_void_p),
        ("kv_rows", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("table", Table),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("tokens", c_int64),
        ("layer_heads", c_int64),
        ("group", c_int64),
        ("spans", c_int64),
        ("tiles", c_int64),
        ("pages", c_int64),
        ("cache_heads", c_int64),
        ("head_dim", c_int64),
        ("window", c_int64),
        ("sinks", c_int64),
        ("scale", c_double),
        ("lists", c_void_p),
        ("list_counts", c_void_p),
        ("list_width", c_int64),
        ("taken", c_void_p),
    ]


@dataclass(frozen=True, slots=True)
class BlockLists:
    """Blocks that each tile of queries reads, for each head of a call: see `tile_count`.

    blocks: int32 [tiles, G, width], ascending; the tile's own blocks and none after them.
    counts: int32 [tiles, G], at least 1.
    """

    blocks: Tensor
    counts: Tensor

    @classmethod
    def of_mask(cls, mask_ZGB: Tensor) -> BlockLists:
        """The blocks of a mask, as `select_tiles` gives it."""
        kept_first = (~mask_ZGB).to(torch.uint8).argsort(dim=-1, stable=True)
        return cls(kept_first.int(), mask_ZGB.sum(-1, dtype=torch.int32))


def is_supported(dtype: torch.dtype, head_dim: int, block_tokens: int) -> bool:
    """Whether the kernel takes such caches."""
    return dtype == torch.bfloat16 and head_dim in (64, 128) and block_tokens == BLOCK


def tile_count(tokens: int, spans: int) -> int:
    """Tiles of a call, at most: each span begins one of its own, in the order of the spans."""
    return tokens // TILE + spans


def attend_spans(
    library: KernelLibrary,
    inputs: SpanInputs,
    window: int,
    sinks: int,
    scale: float,
    lists: BlockLists | None = None,
) -> None:
    """Attention of some heads of a layer, written to their places in the output.

    The rule is `kernels.reference.prefill_windowed`'s; a window of `EVERYTHING` is causal
    attention. With `lists` a query sees of its tile's blocks what is not after it, and no window
    holds. Launches one kernel, or two where no window holds, the first of which clears the
    counter of the other, and waits for nothing.

    Args:
        inputs: bfloat16, index tensors int64; starts and strides of rows multiples of 16 bytes.

    Raises:
        ValueError: shapes or layouts that do not fit.
        KernelError: the launch failed.
    """
    inputs.check()
    q_THD, out_THD, heads_G, kv_row_G, k_cache, v_cache, tables_SB, starts, lens_S = inputs
    tokens, layer_heads, dim = q_THD.shape
    spans = lens_S.shape[0]
    _check_layout(inputs)
    taken = _counter(q_THD, is_windowed=window < EVERYTHING and lists is None)
    args = SpanArgs(
        queries=pointer(q_THD),
        query_row_stride=q_THD.stride(0),
        query_head_stride=q_THD.stride(1),
        out=pointer(out_THD),
        out_row_stride=out_THD.stride(0),
        out_head_stride=out_THD.stride(1),
        heads=pointer(heads_G),
        kv_rows=pointer(kv_row_G),
        keys=pointer(k_cache),
        values=pointer(v_cache),
        table=Table.of(tables_SB),
        query_starts=pointer(starts),
        context_lens=pointer(lens_S),
        tokens=tokens,
        layer_heads=layer_heads,
        group=heads_G.shape[0],
        spans=spans,
        tiles=tile_count(tokens, spans),
        pages=k_cache.shape[0],
        cache_heads=k_cache.shape[1],
        head_dim=dim,
        window=min(window, EVERYTHING),
        sinks=min(sinks, EVERYTHING),
        scale=scale,
        lists=pointer(None if lists is None else lists.blocks),
        list_counts=pointer(None if lists is None else lists.counts),
        list_width=0 if lists is None else lists.blocks.shape[2],
        taken=pointer(taken),
    )
    library.launch_prefill(args, q_THD)


def _counter(like: Tensor, *, is_windowed: bool) -> Tensor | None:
    """From which the kernel takes tiles of queries; each launch has its own.

    The current stream, on which it is allocated and cleared, is the launch's: so nobody else has
    this memory before the kernel has ended. None: tiles that need equally many keys are taken at
    fixed steps.
    """
    return None if is_windowed else torch.zeros(1, dtype=torch.int32, device=like.device)


def _check_layout(inputs: SpanInputs) -> None:
    q_THD, k_cache = inputs.q_THD, inputs.k_cache
    if not is_supported(q_THD.dtype, q_THD.shape[2], k_cache.shape[2]):
        raise ValueError(
            f"no kernel for {q_THD.dtype}, head_dim {q_THD.shape[2]}, pages of {k_cache.shape[2]}"
        )
    check_strides(inputs)


def check_strides(inputs: SpanInputs) -> None:
    """
    Raises:
        ValueError: a tensor does not lie in memory as the kernel reads it.
    """
    for name in ("k_cache", "v_cache"):
        if not getattr(inputs, name).is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    for name in ("q_THD", "out_THD"):
        tensor = getattr(inputs, name)
        if tensor.stride(2) != 1 or any(stride % 8 for stride in tensor.stride()[:2]):
            raise ValueError(f"{name} must have rows of heads that start at multiples of 16 bytes")
    if inputs.block_tables_SB.stride(1) != 1:
        raise ValueError("block tables must be in whole rows")
    for name in ("heads_G", "kv_row_G", "query_starts", "context_lens_S"):
        tensor = getattr(inputs, name)
        if tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64")
