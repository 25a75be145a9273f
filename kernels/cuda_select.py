"""The selection of a decode step on the GPU: `index_select`, launched for a whole layer.

Index keys are scored, each head's blocks chosen by top-p (`kernels.reference.select_blocks`), and
what a tile's heads chose is listed, so that attention reads each block once for all of them.
Attention to the lists is `kernels.cuda_decode`'s. Of a single row each head has a cluster of CTAs,
where the GPU has clusters enough at once; many rows share out all blocks among the CTAs. Several
rows leave a few of these out, so that attention finds some multiprocessors half empty and begins.
Figures: benchmarks/NOTES.md, "Decode at short contexts".

Shapes: R decode rows, S query heads with an index, I index_dim, P pages, K tokens of a page,
B block-table width, G tiles (`head_tiles`). An index cache is [P, index rows, K, I].
"""

from __future__ import annotations

from torch import Tensor

from kernels._args import DATA_TYPES, KEY_TYPES, MAX_WINDOW, SelectArgs, Table, pointer
from kernels._launch import KernelLibrary
from kernels.decode_grid import SEVERAL_ROWS
from kernels.decode_inputs import PagedPool, Selection, WindowRule
from kernels.decode_workspace import DecodeWorkspace
from kernels.head_tiles import HeadTiles

PART, OF_CTAS = 19, 20  # that select of several rows: attention begins on what is left


def list_blocks(
    workspace: DecodeWorkspace,
    tiles: HeadTiles,
    full: PagedPool,
    context_lens_R: Tensor,
    rule: WindowRule,
    selection: Selection,
    attended_RS: Tensor | None,
) -> None:
    """Scores, choice and lists in one launch; the lists are left in the workspace.

    Nothing is checked here: the caller has done so (`decode_inputs`).

    Args:
        workspace: made for at least these rows, tiles, heads and blocks.
        full: the pool whose pages the index keys share.
        context_lens_R: int64, position of each query + 1. Rows of 0, and of contexts shorter than
            `selection.dense_below`, select nothing and have no lists.
        rule: blocks that a tile's local heads read stand in its lists too.
        attended_RS: int64, written: tokens in each head's selected blocks.

    Raises:
        KernelError: no kernel for these keys, or CUDA refused the launch.
    """
    qi, width = selection.qi_RSI, full.tables_RB.shape[1]
    args = index_args(
        workspace.library,
        qi,
        selection.index_row_S,
        selection.index_cache,
        full.tables_RB,
        context_lens_R,
        selection.index_scales,
        selection.age_bias_SA,
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
    args.overlap = workspace.plan(tiles).overlap
    args.window, args.sinks = min(rule.window, MAX_WINDOW), min(rule.sinks, MAX_WINDOW)
    workspace.library.launch_select("index_select", args, qi)


def index_args(
    library: KernelLibrary,
    qi_RSI: Tensor,
    index_row_S: Tensor,
    index_cache: Tensor,
    tables_RB: Tensor,
    context_lens_R: Tensor,
    index_scales: Tensor | None,
    age_bias_SA: Tensor | None,
) -> SelectArgs:
    """The arguments of scoring; `log_mass` is left to the caller.

    Raises:
        KernelError: no kernel for these keys.
    """
    plan = library.select_plan(qi_RSI.device, index_cache.dtype, qi_RSI.shape[2])
    (rows, heads), width = qi_RSI.shape[:2], tables_RB.shape[1]
    return SelectArgs(
        queries=qi_RSI.data_ptr(),
        query_row_stride=qi_RSI.stride(0),
        query_head_stride=qi_RSI.stride(1),
        index_cache=index_cache.data_ptr(),
        index_scales=pointer(index_scales),
        index_row=index_row_S.data_ptr(),
        age_bias=pointer(age_bias_SA),
        index_rows=index_cache.shape[1],
        index_dim=index_cache.shape[3],
        data_type=DATA_TYPES[qi_RSI.dtype],
        key_type=KEY_TYPES[index_cache.dtype],
        table=Table.of(tables_RB),
        context_lens=context_lens_R.data_ptr(),
        rows=rows,
        heads=heads,
        block_tokens=index_cache.shape[2],
        width=width,
        ctas=plan.ctas if rows < SEVERAL_ROWS else max(1, plan.ctas * PART // OF_CTAS),
        shared_bytes=plan.shared_bytes,
        cluster=plan.cluster(heads, width) if rows == 1 else 0,
    )
