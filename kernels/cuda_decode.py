"""Decode attention of a whole layer on the GPU: two launches, no host synchronisation.

    index_select    scores of the index keys, top-p choice of blocks, list of blocks per KV head
                    (`cuda_select`)
    sparse_decode   attention of retrieval and local heads, each block read once per KV head

Both are capturable in a CUDA graph: grids are fixed, and what depends on context lengths and on the
selection is found on the device. Without an indexer a layer needs the second only. With one, the
second starts before the first has ended, on tiles that need no list, where the GPU can do that.

Shapes: R decode rows, H query heads, S of them with an index, D head_dim, I index_dim, P pages,
N KV heads in a cache, K tokens of a page, B block-table width, G tiles (`head_tiles`).
"""

from __future__ import annotations

from dataclasses import asdict, replace

from torch import Tensor

from kernels._args import DATA_TYPES, MAX_ITEMS, MAX_WINDOW, DecodeArgs, Table
from kernels.cuda_select import list_blocks
from kernels.decode_grid import DecodeGrid
from kernels.decode_inputs import (
    PagedPool,
    Selection,
    WindowRule,
    check_layer_inputs,
    checked_selection,
)
from kernels.decode_workspace import DecodeWorkspace
from kernels.head_tiles import HeadTiles


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
    check_layer_inputs(tiles, q_RHD, out_RHD, full, window, context_lens_R)
    if selection is not None:
        selection = checked_selection(selection, tiles, full, attended_RS, context_lens_R)
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
            list_blocks(workspace, tiles, full, context_lens_R, rule, selection, attended_RS)
        listed_from = None if selection is None else selection.dense_below
        attend_listed(
            workspace,
            tiles,
            q_RHD,
            out_RHD,
            full,
            window,
            context_lens_R,
            rule,
            scale,
            listed_from,
            overlap=selection is not None,
        )


def attend_listed(
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
    overlap: bool = False,
) -> None:
    """`sparse_decode` alone, arguments as `attend`.

    Args:
        listed_from: shortest context that has lists in the workspace; None: there are none.
        overlap: the lists are being made by the launch before this one on the stream; tiles
            without one need not wait for it. Wrong after anything but `index_select`.
    """
    plan = workspace.plan(tiles)
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
        tile_heads=tiles.most_heads,
        head_dim=q_RHD.shape[2],
        data_type=DATA_TYPES[q_RHD.dtype],
        scale=scale,
        window=min(rule.window, MAX_WINDOW),
        sinks=min(rule.sinks, MAX_WINDOW),
        partial=workspace.partial.data_ptr(),
        partial_stats=workspace.partial_stats.data_ptr(),
        item_done=workspace.item_done.data_ptr(),
        warps=plan.warps,
        shared_bytes=plan.shared_bytes,
        overlap=overlap and bool(plan.overlap),
    )
    for index, pool in enumerate((full, window)):
        if pool is not None:
            args.keys[index] = pool.k_cache.data_ptr()
            args.values[index] = pool.v_cache.data_ptr()
            args.kv_rows[index] = pool.k_cache.shape[1]
            args.tables[index] = Table.of(pool.tables_RB)
            args.block_tokens = pool.k_cache.shape[2]
    listed_blocks = 0 if listed_from is None or full is None else full.tables_RB.shape[1]
    grid = DecodeGrid.of(plan, args.rows, tiles.count, args.block_tokens, listed_blocks)
    for name, number in asdict(grid).items():
        setattr(args, name, number)
    if listed_from is not None and full is not None:
        args.lists = workspace.lists.data_ptr()
        args.list_counts = workspace.list_counts.data_ptr()
        args.list_width = listed_blocks
        args.dense_below = listed_from
    workspace.library.launch_decode(args, q_RHD)


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
