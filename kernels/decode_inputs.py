"""What the CUDA decode kernels take, and the checks of it: once per call, by name.

Shapes as in `kernels.cuda_decode`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels._args import DATA_TYPES, MAX_BLOCKS
from kernels._checks import check_shapes
from kernels.block_age import AGE_RANGES
from kernels.head_tiles import HeadTiles


@dataclass(frozen=True, slots=True)
class PagedPool:
    """Keys and values [P, N, K, D] of one pool, and its block tables [R, B], int64 or int32."""

    k_cache: Tensor
    v_cache: Tensor
    tables_RB: Tensor


@dataclass(frozen=True, slots=True)
class Selection:
    """What retrieval heads with an index choose their blocks by.

    qi_RSI: index queries, bfloat16 or float32.
    index_row_S: int64, row of each head's index keys.
    index_cache: [P, index rows, K, I], I of 8, 16 or 32; pages as in the full pool. In the dtype
        of the queries, or int8.
    top_p_S: float32, the checkpoint's value per head.
    own_top_p_R: float32, a row's own value; NaN where it has none.
    dense_below: rows of shorter contexts attend everything, and count 0 tokens as attended.
    index_scales: bfloat16 [P, index rows, K], of int8 keys.
    age_bias_SA: float32, each head's bias by range of ages (`kernels.block_age`).
    """

    qi_RSI: Tensor
    index_row_S: Tensor
    index_cache: Tensor
    top_p_S: Tensor
    own_top_p_R: Tensor | None = None
    dense_below: int = 0
    index_scales: Tensor | None = None
    age_bias_SA: Tensor | None = None


@dataclass(frozen=True, slots=True)
class WindowRule:
    """A local head sees the last `window` tokens and the first `sinks`."""

    window: int
    sinks: int


def check_pool(name: str, k_cache: Tensor, v_cache: Tensor, tables_RB: Tensor) -> None:
    """Raises ValueError for a layout that `sparse_decode` does not take."""
    for part, cache in (("keys", k_cache), ("values", v_cache)):
        if not cache.is_contiguous():
            raise ValueError(f"{part} of the {name} pool must be contiguous")
    if k_cache.shape[2] % 16:
        raise ValueError(f"pages must hold a multiple of 16 tokens, got {k_cache.shape[2]}")
    check_tables(name, tables_RB)


def check_tables(name: str, tables_RB: Tensor) -> None:
    """Raises ValueError for block tables that the kernels do not take."""
    if tables_RB.dtype not in (torch.int64, torch.int32) or tables_RB.stride(1) != 1:
        raise ValueError(f"block tables of the {name} pool must be int64 or int32 in whole rows")
    if tables_RB.shape[1] > MAX_BLOCKS:
        raise ValueError(f"block tables are {tables_RB.shape[1]} wide; kernels take {MAX_BLOCKS}")


def aligned_queries(qi_RSI: Tensor) -> Tensor:
    """Index queries that can be read in 16-byte pieces; a copy if need be."""
    strides = (stride * qi_RSI.element_size() % 16 for stride in qi_RSI.stride()[:2])
    whole = qi_RSI.stride(2) == 1 and qi_RSI.data_ptr() % 16 == 0 and not any(strides)
    return qi_RSI if whole else qi_RSI.clone(memory_format=torch.contiguous_format)


def check_index(qi_RSI: Tensor, index_cache: Tensor, index_scales: Tensor | None) -> None:
    """Raises ValueError for index keys that the kernels do not take."""
    if not index_cache.is_contiguous():
        raise ValueError("index keys must be contiguous")
    if qi_RSI.dtype not in DATA_TYPES:
        raise ValueError(f"index queries must be bfloat16 or float32, got {qi_RSI.dtype}")
    if index_scales is None:
        if qi_RSI.dtype != index_cache.dtype:
            raise ValueError("index queries and index keys must be of one dtype")
        return
    check_shapes({}, index_cache=(index_cache, "P X K I"), index_scales=(index_scales, "P X K"))
    if index_cache.dtype != torch.int8 or index_scales.dtype != torch.bfloat16:
        raise ValueError("scales must be bfloat16, and index keys with scales int8")
    if not index_scales.is_contiguous():
        raise ValueError("scales of index keys must be contiguous")


def check_age_bias(age_bias_SA: Tensor | None, heads: int) -> None:
    """Raises ValueError for biases that the kernels do not take."""
    if age_bias_SA is None:
        return
    check_shapes({"S": heads, "A": AGE_RANGES}, age_bias=(age_bias_SA, "S A"))
    if age_bias_SA.dtype != torch.float32 or not age_bias_SA.is_contiguous():
        raise ValueError("age_bias must be torch.float32 and contiguous")


def check_layer_inputs(
    tiles: HeadTiles,
    q_RHD: Tensor,
    out_RHD: Tensor,
    full: PagedPool | None,
    window: PagedPool | None,
    context_lens_R: Tensor,
) -> None:
    sizes = {"H": tiles.num_heads}
    check_shapes(
        sizes, q=(q_RHD, "R H D"), out=(out_RHD, "R H D"), context_lens=(context_lens_R, "R")
    )
    for name, pool in (("full", full), ("window", window)):
        if pool is None:
            continue
        of_pool = {dim: sizes[dim] for dim in sizes if dim in "RDK"}
        check_shapes(
            of_pool,
            k_cache=(pool.k_cache, "P N K D"),
            v_cache=(pool.v_cache, "P N K D"),
            block_tables=(pool.tables_RB, "R B"),
        )
        sizes["K"] = of_pool["K"]
        check_pool(name, pool.k_cache, pool.v_cache, pool.tables_RB)
        if not q_RHD.dtype == out_RHD.dtype == pool.k_cache.dtype == pool.v_cache.dtype:
            raise ValueError(f"queries, output and the {name} pool must be of one dtype")
    if full is None and window is None:
        raise ValueError("attention needs a pool")
    if q_RHD.stride(2) != 1 or out_RHD.stride(2) != 1:
        raise ValueError("the dimensions of a query and of its output must lie side by side")
    if context_lens_R.dtype != torch.int64 or not context_lens_R.is_contiguous():
        raise ValueError("context_lens must be int64 and contiguous")


def checked_selection(
    selection: Selection,
    tiles: HeadTiles,
    full: PagedPool | None,
    attended_RS: Tensor | None,
    context_lens_R: Tensor,
) -> Selection:
    """The selection with its queries in a layout that can be read."""
    if full is None:
        raise ValueError("selection needs the full pool, whose pages the index keys share")
    sizes = {"R": len(context_lens_R), "S": len(tiles.tile_of_selected_S)}
    sizes["P"], _, sizes["K"], _ = full.k_cache.shape
    check_shapes(
        sizes,
        qi=(selection.qi_RSI, "R S I"),
        index_row=(selection.index_row_S, "S"),
        index_cache=(selection.index_cache, "P X K I"),
        top_p=(selection.top_p_S, "S"),
    )
    if attended_RS is not None:
        check_shapes(sizes, attended=(attended_RS, "R S"))
        if attended_RS.dtype != torch.int64 or not attended_RS.is_contiguous():
            raise ValueError("attended must be int64 and contiguous")
    wanted = {
        "index_row": (selection.index_row_S, torch.int64),
        "top_p": (selection.top_p_S, torch.float32),
        "own_top_p": (selection.own_top_p_R, torch.float32),
    }
    for name, (tensor, dtype) in wanted.items():
        if tensor is not None and (tensor.dtype != dtype or not tensor.is_contiguous()):
            raise ValueError(f"{name} must be {dtype} and contiguous")
    if selection.own_top_p_R is not None:
        check_shapes(sizes, own_top_p=(selection.own_top_p_R, "R"))
    check_index(selection.qi_RSI, selection.index_cache, selection.index_scales)
    check_age_bias(selection.age_bias_SA, sizes["S"])
    return replace(selection, qi_RSI=aligned_queries(selection.qi_RSI))
