"""Decode attention of a whole layer on the GPU: two launches, no host synchronisation.

    index_select    scores of the index keys, top-p choice of blocks, list of blocks per KV head
    sparse_decode   attention of retrieval and local heads, each block read once per KV head

Both are capturable in a CUDA graph: grids are fixed, and what depends on context lengths and on the
selection is found on the device. Without an indexer a layer needs the second only.

Shapes: R decode rows, H query heads, S of them with an index, D head_dim, I index_dim, P pages,
N KV heads in a cache, K tokens of a page, B block-table width, G tiles (`head_tiles`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels._checks import check_shapes
from kernels._launch import (
    DATA_TYPES,
    ENTRY_WORDS,
    MAX_BLOCKS,
    MAX_ITEMS,
    MAX_WINDOW,
    TILE_HEADS,
    DecodeArgs,
    KernelLibrary,
    SelectArgs,
    Table,
    pointer,
)
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

    qi_RSI: index queries, in the dtype of the index keys.
    index_row_S: int64, row of each head's index keys.
    index_cache: [P, index rows, K, I], I of 8, 16 or 32; pages as in the full pool.
    top_p_S: float32, the checkpoint's value per head.
    own_top_p_R: float32, a row's own value; NaN where it has none.
    dense_below: rows of shorter contexts attend everything, and count 0 tokens as attended.
    """

    qi_RSI: Tensor
    index_row_S: Tensor
    index_cache: Tensor
    top_p_S: Tensor
    own_top_p_R: Tensor | None = None
    dense_below: int = 0


@dataclass(frozen=True, slots=True)
class WindowRule:
    """A local head sees the last `window` tokens and the first `sinks`."""

    window: int
    sinks: int


class DecodeWorkspace:
    """Memory for the launches of one stream, made once for the largest batch; layers share it.

    Counters in it are zero between launches, which the kernels see to.
    """

    def __init__(
        self,
        library: KernelLibrary,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        *,
        max_rows: int,
        max_tiles: int,
        max_selecting: int,
        max_blocks: int,
    ) -> None:
        """
        Args:
            max_rows: decode rows of a step.
            max_tiles: tiles of a layer.
            max_selecting: query heads of a layer that select blocks.
            max_blocks: block-table width.

        Raises:
            KernelError: no kernel for this dtype and head_dim.
            ValueError: a context of more than 65535 blocks.
        """
        if max_blocks > MAX_BLOCKS:
            raise ValueError(f"contexts of {max_blocks} blocks; the kernels take {MAX_BLOCKS}")
        self.library = library
        self.plan = library.decode_plan(device, dtype, head_dim)
        self.limits = (max_rows, max_tiles, max_selecting, max_blocks)
        rows = max_rows

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        self.log_mass = floats(rows * max_selecting * max_blocks)
        self.words = ints(rows * max_selecting * (-(-max_blocks // 32)))
        self.head_done = ints(rows * max_selecting)
        self.group_done = ints(rows * max_tiles)
        self.lists = ints(rows * max_tiles * max_blocks * ENTRY_WORDS if max_selecting else 0)
        self.list_counts = ints(rows * max_tiles)
        self.item_done = ints(rows * max_tiles)
        parts = (self.plan.ctas, 2, TILE_HEADS)
        self.partial = floats(*parts, head_dim)
        self.partial_stats = floats(*parts, 2)

    def check(self, rows: int, tiles: int, selecting: int, blocks: int) -> None:
        """Raises ValueError if a launch needs more than was made."""
        names = ("rows", "tiles", "selecting heads", "blocks")
        sizes = (rows, tiles, selecting, blocks)
        for name, size, limit in zip(names, sizes, self.limits, strict=True):
            if size > limit:
                raise ValueError(f"{size} {name}; the workspace was made for {limit}")


def attend(
    workspace: DecodeWorkspace,
    tiles: HeadTiles,
    q_RHD: Tensor,
    out_RHD: Tensor,
    full: PagedPool | None,
    window: PagedPool | None,
    context_lens_R: Tensor,
    rule: WindowRule,
    scale: float,
    selection: Selection | None = None,
    attended_RS: Tensor | None = None,
) -> None:
    """Attention of one query token a row: writes `out_RHD`. All heads of the layer, all roles.

    Args:
        q_RHD: queries after RoPE, bfloat16 or float32 as the caches.
        full, window: the pools that the tiles name; None where no tile does.
        context_lens_R: int64, position of each query + 1; 0 pads a batch and gives zeros.
        selection: None lets retrieval heads see the whole context.
        attended_RS: int64, written: tokens in each head's selected blocks.

    Raises:
        ValueError: a shape, dtype or layout that the kernels do not take.
        KernelError: CUDA refused the launch.
    """
    _check(tiles, q_RHD, out_RHD, full, window, context_lens_R)
    if selection is not None:
        selection = _check_selection(selection, tiles, full, attended_RS, context_lens_R)
    rows, step = len(context_lens_R), MAX_ITEMS // tiles.count
    for start in range(0, rows, step):
        part = slice(start, start + step)
        if step < rows:
            attend(
                workspace,
                tiles,
                q_RHD[part],
                out_RHD[part],
                _rows_of_pool(full, part),
                _rows_of_pool(window, part),
                context_lens_R[part],
                rule,
                scale,
                _rows_of_selection(selection, part),
                None if attended_RS is None else attended_RS[part],
            )
            continue
        width = max(p.tables_RB.shape[1] for p in (full, window) if p is not None)
        workspace.check(rows, tiles.count, len(tiles.tile_of_selected_S), width)
        if selection is not None:
            assert full is not None
            _select(workspace, tiles, full, context_lens_R, rule, selection, attended_RS)
        listed_from = None if selection is None else selection.dense_below
        _attend(
            workspace, tiles, q_RHD, out_RHD, full, window, context_lens_R, rule, scale, listed_from
        )


def _select(
    workspace: DecodeWorkspace,
    tiles: HeadTiles,
    full: PagedPool,
    context_lens_R: Tensor,
    rule: WindowRule,
    selection: Selection,
    attended_RS: Tensor | None,
) -> None:
    """Scores, selection and lists of blocks of all rows."""
    qi, width = selection.qi_RSI, full.tables_RB.shape[1]
    args = index_args(
        qi, selection.index_row_S, selection.index_cache, full.tables_RB, context_lens_R
    )
    args.log_mass = workspace.log_mass.data_ptr()
    args.top_p = selection.top_p_S.data_ptr()
    args.top_p_row_stride, args.top_p_head_stride = 0, selection.top_p_S.stride(0)
    args.own_top_p = pointer(selection.own_top_p_R)
    args.dense_below = selection.dense_below
    args.words = workspace.words.data_ptr()
    args.words_width = -(-width // 32)
    args.attended = pointer(attended_RS)
    args.head_done = workspace.head_done.data_ptr()
    args.groups = tiles.groups.data_ptr()
    args.group_of_head = tiles.tile_of_selected_S.data_ptr()
    args.group_count = tiles.count
    args.group_done = workspace.group_done.data_ptr()
    args.lists = workspace.lists.data_ptr()
    args.list_counts = workspace.list_counts.data_ptr()
    args.window, args.sinks = min(rule.window, MAX_WINDOW), min(rule.sinks, MAX_WINDOW)
    args.ctas = workspace.library.select_ctas(qi.device, qi.dtype, qi.shape[2])
    workspace.library.launch_select("index_select", args, qi)


def _attend(
    workspace: DecodeWorkspace,
    tiles: HeadTiles,
    q_RHD: Tensor,
    out_RHD: Tensor,
    full: PagedPool | None,
    window: PagedPool | None,
    context_lens_R: Tensor,
    rule: WindowRule,
    scale: float,
    listed_from: int | None,
) -> None:
    """`listed_from`: shortest context that has lists in the workspace; None: there are none."""
    plan = workspace.plan
    args = DecodeArgs(
        queries=q_RHD.data_ptr(),
        query_row_stride=q_RHD.stride(0),
        query_head_stride=q_RHD.stride(1),
        out=out_RHD.data_ptr(),
        out_row_stride=out_RHD.stride(0),
        out_head_stride=out_RHD.stride(1),
        context_lens=context_lens_R.data_ptr(),
        rows=len(context_lens_R),
        groups=tiles.groups.data_ptr(),
        group_count=tiles.count,
        head_dim=q_RHD.shape[2],
        data_type=DATA_TYPES[q_RHD.dtype],
        scale=scale,
        window=min(rule.window, MAX_WINDOW),
        sinks=min(rule.sinks, MAX_WINDOW),
        partial=workspace.partial.data_ptr(),
        partial_stats=workspace.partial_stats.data_ptr(),
        item_done=workspace.item_done.data_ptr(),
        ctas=plan.ctas,
        warps=plan.warps,
        shared_bytes=plan.shared_bytes,
    )
    for index, pool in enumerate((full, window)):
        if pool is not None:
            args.keys[index] = pool.k_cache.data_ptr()
            args.values[index] = pool.v_cache.data_ptr()
            args.kv_rows[index] = pool.k_cache.shape[1]
            args.tables[index] = Table.of(pool.tables_RB)
            args.block_tokens = pool.k_cache.shape[2]
    if listed_from is not None and full is not None:
        args.lists = workspace.lists.data_ptr()
        args.list_counts = workspace.list_counts.data_ptr()
        args.list_width = full.tables_RB.shape[1]
        args.dense_below = listed_from
    workspace.library.launch_decode(args, q_RHD)


def index_args(
    qi_RSI: Tensor,
    index_row_S: Tensor,
    index_cache: Tensor,
    tables_RB: Tensor,
    context_lens_R: Tensor,
) -> SelectArgs:
    """The arguments of scoring; `log_mass` and `ctas` are left to the caller."""
    return SelectArgs(
        queries=qi_RSI.data_ptr(),
        query_row_stride=qi_RSI.stride(0),
        query_head_stride=qi_RSI.stride(1),
        index_cache=index_cache.data_ptr(),
        index_row=index_row_S.data_ptr(),
        index_rows=index_cache.shape[1],
        index_dim=index_cache.shape[3],
        data_type=DATA_TYPES[index_cache.dtype],
        table=Table.of(tables_RB),
        context_lens=context_lens_R.data_ptr(),
        rows=qi_RSI.shape[0],
        heads=qi_RSI.shape[1],
        block_tokens=index_cache.shape[2],
        width=tables_RB.shape[1],
    )


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


def _check(
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


def _check_selection(
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
    if selection.qi_RSI.dtype != selection.index_cache.dtype:
        raise ValueError("index queries and index keys must be of one dtype")
    if not selection.index_cache.is_contiguous():
        raise ValueError("index keys must be contiguous")
    return replace(selection, qi_RSI=aligned_queries(selection.qi_RSI))


def _rows_of_pool(pool: PagedPool | None, part: slice) -> PagedPool | None:
    return None if pool is None else replace(pool, tables_RB=pool.tables_RB[part])


def _rows_of_selection(selection: Selection | None, part: slice) -> Selection | None:
    if selection is None:
        return None
    own = selection.own_top_p_R
    return replace(
        selection,
        qi_RSI=selection.qi_RSI[part],
        own_top_p_R=None if own is None else own[part],
    )
