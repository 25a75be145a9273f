"""Tries out the kernels of decode attention on a `TrialLayer`: `index_select`, `sparse_decode`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import decode, indexer
from kernels._launch import KernelLibrary
from kernels.cuda_decode import attend
from kernels.cuda_ops import CudaOps
from kernels.decode_workspace import DecodeWorkspace
from kernels.head_tiles import HeadTiles
from kernels.trial import check_close, check_equal
from kernels.trial_layer import LONG_ROW, DecodeKind, TrialLayer


def try_decode(
    library: KernelLibrary,
    kind: DecodeKind,
    device: torch.device,
    twins: torch.device | None = None,
) -> None:
    """Attention of a layer, with its selection if the model selects; then of one row by itself.

    Args:
        twins: where the PyTorch ops run; None: on the device.

    Raises:
        TrialError: a kernel gives something else than its twin.
        KernelError: there is no such kernel, or a launch failed.
    """
    whole = TrialLayer.make(kind)
    for layer in (whole, whole.of_row(LONG_ROW)):
        given, twin = layer.to(device), layer.to(twins or device)
        mask_RSB = None if layer.selection is None else _checked_selection(library, given, twin)
        _check_attention(library, given, twin, mask_RSB)


def _check_attention(
    library: KernelLibrary, layer: TrialLayer, twin: TrialLayer, mask_RSB: Tensor | None
) -> None:
    """Output and counts; twice, since a launch must leave the workspace as it was."""
    device, dtype = layer.q_RHD.device, layer.q_RHD.dtype
    tiles = HeadTiles.make(layer.roles, device, split_roles=layer.selection is not None)
    rows, width = layer.full.tables_RB.shape
    workspace = DecodeWorkspace(
        library,
        device,
        dtype,
        layer.q_RHD.shape[2],
        max_rows=rows,
        max_tiles=tiles.count,
        max_selecting=len(tiles.tile_of_selected_S),
        max_blocks=width,
    )
    results = [_run(workspace, tiles, layer) for _ in range(2)]
    exact_RHD = _attention(twin, mask_RSB, torch.float32)
    twin_RHD = _attention(twin, mask_RSB, dtype)
    for out_RHD, attended_RS in results:
        if attended_RS is not None and mask_RSB is not None and twin.selection is not None:
            counts_RS = indexer.count_attended(mask_RSB, twin.lens_R, twin.block_tokens)
            selects_R1 = (twin.lens_R >= twin.selection.dense_below)[:, None]
            check_equal("index_select", attended_RS, counts_RS * selects_R1)
        check_close("sparse_decode", out_RHD, exact_RHD, twin_RHD, rtol=1e-4, atol=2e-6)


def _run(
    workspace: DecodeWorkspace, tiles: HeadTiles, layer: TrialLayer
) -> tuple[Tensor, Tensor | None]:
    """Output and attended tokens, NaN and -1 where nothing was written."""
    out_RHD, attended_RS = torch.full_like(layer.q_RHD, torch.nan), None
    if layer.selection is not None:
        attended_RS = layer.lens_R.new_full(layer.selection.qi_RSI.shape[:2], -1)
    has_window = any(role.pool == "window" for role in layer.roles)
    attend(
        workspace,
        tiles,
        layer.q_RHD,
        out_RHD,
        layer.full,
        layer.window if has_window else None,
        layer.lens_R,
        layer.rule,
        layer.scale,
        layer.selection,
        attended_RS,
    )
    return out_RHD, attended_RS


def _checked_selection(library: KernelLibrary, layer: TrialLayer, twin: TrialLayer) -> Tensor:
    """Blocks that the kernel's own scores select, [R, S, B]: those differ in the last digits."""
    log_mass_RSB = _log_masses(layer, CudaOps(library).score_blocks, in_float=False)
    want_RSB = _log_masses(twin, indexer.score_blocks, in_float=True)
    check_close("index_select", log_mass_RSB, want_RSB)
    given = twin.selection
    assert given is not None
    assert given.own_top_p_R is not None
    own_R1 = given.own_top_p_R[:, None]
    top_p_RS = torch.where(own_R1.isnan(), given.top_p_S.expand(want_RSB.shape[:2]), own_R1)
    top_p_RS = top_p_RS.masked_fill((twin.lens_R < given.dense_below)[:, None], 1.0)
    log_mass_RSB = log_mass_RSB.to(want_RSB.device)
    return indexer.select_blocks(log_mass_RSB, top_p_RS, twin.lens_R, twin.block_tokens)


def _log_masses(
    layer: TrialLayer, score_blocks: Callable[..., Tensor], *, in_float: bool
) -> Tensor:
    """Of all blocks; `in_float`: of float32 queries and keys, but of 8-bit keys as they are."""
    given = layer.selection
    assert given is not None
    qi_RSI, keys = given.qi_RSI, given.index_cache
    if in_float:
        qi_RSI, keys = qi_RSI.float(), keys if keys.dtype == torch.int8 else keys.float()
    pages = (layer.full.tables_RB, layer.lens_R, given.index_scales, given.age_bias_SA)
    return score_blocks(qi_RSI, given.index_row_S, keys, *pages)


def _attention(layer: TrialLayer, mask_RSB: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The answer by the PyTorch ops in `dtype`; zeros in the row that pads."""
    live_R = layer.lens_R > 0
    q_RHD, lens_R = layer.q_RHD[live_R].to(dtype), layer.lens_R[live_R]
    live_RHD = torch.zeros_like(q_RHD)
    for key in dict.fromkeys((role.pool, role.retrieval) for role in layer.roles):
        pool = layer.full if key[0] == "full" else layer.window
        heads = [i for i, role in enumerate(layer.roles) if (role.pool, role.retrieval) == key]
        kv_row_H = torch.tensor([layer.roles[head].kv_row for head in heads]).to(lens_R)
        caches = pool.k_cache.to(dtype), pool.v_cache.to(dtype)
        args = (q_RHD[:, heads], kv_row_H, *caches, pool.tables_RB[live_R], lens_R)
        if not key[1]:
            rule = (layer.rule.window, layer.rule.sinks)
            found_RHD = decode.decode_windowed(*args, *rule, layer.scale)
        elif mask_RSB is None:
            found_RHD = decode.decode_dense(*args, layer.scale)
        else:
            rows = [layer.roles[head].selected for head in heads]
            found_RHD = decode.decode_sparse(*args, mask_RSB[live_R][:, rows], layer.scale)
        live_RHD[:, heads] = found_RHD
    out_RHD = torch.zeros_like(layer.q_RHD, dtype=dtype)
    out_RHD[live_R] = live_RHD
    return out_RHD
