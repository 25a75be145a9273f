"""Attention of a whole layer at decode by the kernels, against the PyTorch ops.

Truth is what the ops of `kernels.decode` and `kernels.indexer` give in float32. In bfloat16 a
kernel may be twice as far from it as the ops are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import decode, indexer
from kernels._launch import KernelLibrary
from kernels.cuda_ops import CudaOps
from tests.kernels.layer_case import LayerCase


def check_layer(case: LayerCase, library: KernelLibrary) -> None:
    """The kernels against truth; twice, since the first launch must leave the workspace usable."""
    workspace = case.workspace(library)
    out_RHD, attended_RS = case.run(workspace)
    mask_RSB = selected_blocks(case, CudaOps(library))
    truth_RHD = output_by_ops(case, mask_RSB)
    worst = float((out_RHD.float() - truth_RHD).abs().max())
    if out_RHD.dtype == torch.float32:
        torch.testing.assert_close(out_RHD, truth_RHD, rtol=1e-4, atol=2e-6)
    else:
        twin_RHD = output_by_ops(case, mask_RSB, out_RHD.dtype).float()
        allowed = 2 * float((twin_RHD - truth_RHD).abs().max()) + 1e-5
        assert worst <= allowed, f"error {worst:.2e}, twice the PyTorch op's is {allowed:.2e}"
    if attended_RS is not None and mask_RSB is not None and case.selection is not None:
        counts_RS = indexer.count_attended(mask_RSB, case.lens_R, case.full.k_cache.shape[2])
        selects_R1 = (case.lens_R >= max(case.selection.dense_below, 1))[:, None]
        assert torch.equal(attended_RS, counts_RS * selects_R1)
    again_RHD, attended_again = case.run(workspace)
    assert torch.equal(again_RHD, out_RHD)
    if attended_RS is not None and attended_again is not None:
        assert torch.equal(attended_again, attended_RS)
    for counter in (workspace.head_done, workspace.group_done, workspace.item_done):
        assert not counter.any(), "counters are back at zero"


def selected_blocks(case: LayerCase, ops: CudaOps) -> Tensor | None:
    """Blocks that the ops' own scores select, bool [R, S, B]: scores differ in last digits."""
    if case.selection is None:
        return None
    given = case.selection
    pages = (case.full.tables_RB, case.lens_R, given.index_scales, given.age_bias_SA)
    log_mass = ops.score_blocks(given.qi_RSI, given.index_row_S, given.index_cache, *pages)
    top_p_RS = given.top_p_S.expand(log_mass.shape[:2])
    if given.own_top_p_R is not None:
        own_R1 = given.own_top_p_R[:, None]
        top_p_RS = torch.where(own_R1.isnan(), top_p_RS, own_R1)
    short_R1 = (case.lens_R < given.dense_below)[:, None]
    top_p_RS = top_p_RS.masked_fill(short_R1, 1.0)
    return indexer.select_blocks(log_mass, top_p_RS, case.lens_R, case.full.k_cache.shape[2])


def output_by_ops(
    case: LayerCase, mask_RSB: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Output by the PyTorch ops in `dtype`; zeros in rows without a context."""
    live_R = case.lens_R > 0
    whole_RHD = torch.zeros_like(case.q_RHD, dtype=dtype)
    if not bool(live_R.any()):
        return whole_RHD
    lens_R, q_RHD = case.lens_R[live_R], case.q_RHD[live_R].to(dtype)
    out_RHD = torch.zeros_like(q_RHD)
    for pool, name in ((case.full, "full"), (case.window, "window")):
        caches = pool.k_cache.to(dtype), pool.v_cache.to(dtype)
        for retrieval in (False, True):
            found = [
                (head, role)
                for head, role in enumerate(case.roles)
                if role.pool == name and role.retrieval is retrieval
            ]
            if not found:
                continue
            heads = [head for head, _ in found]
            kv_row_H = torch.tensor([role.kv_row for _, role in found]).to(lens_R)
            args = (q_RHD[:, heads], kv_row_H, *caches, pool.tables_RB[live_R], lens_R)
            if not retrieval:
                rule = (case.rule.window, case.rule.sinks)
                out_RHD[:, heads] = decode.decode_windowed(*args, *rule, case.scale)
            elif mask_RSB is None:
                out_RHD[:, heads] = decode.decode_dense(*args, case.scale)
            else:
                rows = [role.selected for _, role in found]
                mask_RHB = mask_RSB[live_R][:, rows]
                out_RHD[:, heads] = decode.decode_sparse(*args, mask_RHB, case.scale)
    whole_RHD[live_R] = out_RHD
    return whole_RHD
