"""The decode ops of `kernels.indexer` and `kernels.decode` on CUDA kernels: same names, signatures.

One op is one part of what the kernels do, so tests can compare part by part; the engine calls
`cuda_decode.attend`, which does a layer in two launches and leaves nothing on the host.
Differences from the twins: head_dim is 64 or 128, index_dim 8, 16 or 32, a page a multiple of 16
tokens, everything bfloat16 or float32; a head with an empty mask gives zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels._args import SelectArgs
from kernels._checks import check_shapes
from kernels._launch import KernelLibrary
from kernels.cuda_decode import attend, attend_listed
from kernels.cuda_select import index_args
from kernels.decode_inputs import (
    PagedPool,
    WindowRule,
    aligned_queries,
    check_age_bias,
    check_index,
    check_tables,
)
from kernels.decode_workspace import DecodeWorkspace
from kernels.head_tiles import HeadRole, HeadTiles
from kernels.window_plan import WindowPlan

SELECT_BYTES = 2**13  # of shared memory that `select` keeps log masses in: 2048 of them


class CudaOps:
    """The ops of one compiled library; argument shapes as in the twins."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library

    def score_blocks(
        self,
        qi_RHI: Tensor,
        index_row_H: Tensor,
        index_cache: Tensor,
        block_tables_RB: Tensor,
        context_lens_R: Tensor,
        index_scales: Tensor | None = None,
        age_bias_HA: Tensor | None = None,
    ) -> Tensor:
        """`kernels.indexer.score_blocks`: log mass of every block, float32 [R, H, B]."""
        check_tables("full", block_tables_RB)
        check_index(qi_RHI, index_cache, index_scales)
        rows, heads, _ = qi_RHI.shape
        check_age_bias(age_bias_HA, heads)
        log_mass_RHB = torch.full(
            (rows, heads, block_tables_RB.shape[1]), -torch.inf, device=qi_RHI.device
        )
        qi_RHI = aligned_queries(qi_RHI)
        keys = (index_row_H, index_cache, block_tables_RB, context_lens_R, index_scales)
        args = index_args(self._library, qi_RHI, *keys, age_bias_HA)
        args.log_mass = log_mass_RHB.data_ptr()
        self._library.launch_select("index_select", args, qi_RHI)
        return log_mass_RHB

    def select_blocks(
        self, log_mass_RHB: Tensor, top_p_RH: Tensor, context_lens_R: Tensor, block_tokens: int
    ) -> Tensor:
        """`kernels.indexer.select_blocks`: bool [R, H, B]."""
        check_shapes(
            {},
            log_mass=(log_mass_RHB, "R H B"),
            top_p=(top_p_RH, "R H"),
            context_lens=(context_lens_R, "R"),
        )
        log_mass_RHB = log_mass_RHB.contiguous()
        rows, heads, width = log_mass_RHB.shape
        mask_RHB = torch.empty(log_mass_RHB.shape, dtype=torch.bool, device=log_mass_RHB.device)
        words = _words(rows, heads, width, log_mass_RHB.device)
        args = SelectArgs(
            context_lens=context_lens_R.data_ptr(),
            rows=rows,
            heads=heads,
            block_tokens=block_tokens,
            log_mass=log_mass_RHB.data_ptr(),
            width=width,
            top_p=top_p_RH.data_ptr(),
            top_p_row_stride=top_p_RH.stride(0),
            top_p_head_stride=top_p_RH.stride(1),
            words=words.data_ptr(),
            words_width=words.shape[2],
            mask=mask_RHB.data_ptr(),
            shared_bytes=SELECT_BYTES,
        )
        self._library.launch_select("select", args, log_mass_RHB)
        return mask_RHB

    def decode_sparse(
        self,
        q_RHD: Tensor,
        kv_row_H: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables_RB: Tensor,
        context_lens_R: Tensor,
        mask_RHB: Tensor,
        scale: float,
    ) -> Tensor:
        """`kernels.decode.decode_sparse`: attention over the blocks of a mask, [R, H, D]."""
        check_shapes({}, q=(q_RHD, "R H D"), mask=(mask_RHB, "R H B"))
        roles = [
            HeadRole("full", row, retrieval=True, selected=head)
            for head, row in enumerate(kv_row_H.tolist())
        ]
        tiles = HeadTiles.make(roles, q_RHD.device)
        pool = PagedPool(k_cache, v_cache, block_tables_RB)
        workspace = self._workspace(tiles, q_RHD, mask_RHB.shape[2])
        mask_RHB = mask_RHB.contiguous()
        rows, heads, width = mask_RHB.shape
        words = _words(rows, heads, width, mask_RHB.device)
        args = SelectArgs(
            context_lens=context_lens_R.data_ptr(),
            rows=rows,
            heads=heads,
            block_tokens=k_cache.shape[2],
            width=width,
            words=words.data_ptr(),
            words_width=words.shape[2],
            mask=mask_RHB.data_ptr(),
            groups=tiles.groups.data_ptr(),
            group_count=tiles.count,
            lists=workspace.lists.data_ptr(),
            list_counts=workspace.list_counts.data_ptr(),
        )
        self._library.launch_select("list", args, q_RHD)
        out_RHD = torch.empty_like(q_RHD)
        attend_listed(
            workspace,
            tiles,
            q_RHD,
            out_RHD,
            pool,
            None,
            context_lens_R,
            WindowRule(0, 0),
            scale,
            listed_from=0,
        )
        return out_RHD

    def decode_windowed(
        self,
        q_RHD: Tensor,
        kv_row_H: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables_RB: Tensor,
        context_lens_R: Tensor,
        window: int,
        sinks: int,
        scale: float,
        plan: WindowPlan | None = None,
    ) -> Tensor:
        """`kernels.decode.decode_windowed`: the last `window` and the first `sinks`, [R, H, D]."""
        pool = PagedPool(k_cache, v_cache, block_tables_RB)
        roles = [HeadRole("window", row, retrieval=False) for row in kv_row_H.tolist()]
        return self._whole(
            q_RHD, roles, None, pool, context_lens_R, WindowRule(window, sinks), scale
        )

    def decode_dense(
        self,
        q_RHD: Tensor,
        kv_row_H: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables_RB: Tensor,
        context_lens_R: Tensor,
        scale: float,
    ) -> Tensor:
        """`kernels.decode.decode_dense`: the whole context, [R, H, D]."""
        pool = PagedPool(k_cache, v_cache, block_tables_RB)
        roles = [HeadRole("full", row, retrieval=True) for row in kv_row_H.tolist()]
        return self._whole(q_RHD, roles, pool, None, context_lens_R, WindowRule(0, 0), scale)

    def _whole(
        self,
        q_RHD: Tensor,
        roles: Sequence[HeadRole],
        full: PagedPool | None,
        window: PagedPool | None,
        context_lens_R: Tensor,
        rule: WindowRule,
        scale: float,
    ) -> Tensor:
        """Heads of one role, with a workspace of their own."""
        tiles = HeadTiles.make(roles, q_RHD.device)
        tables = (full or window).tables_RB  # type: ignore[union-attr]  # one of them is there
        out_RHD = torch.empty_like(q_RHD)
        workspace = self._workspace(tiles, q_RHD, tables.shape[1])
        attend(workspace, tiles, q_RHD, out_RHD, full, window, context_lens_R, rule, scale)
        return out_RHD

    def _workspace(self, tiles: HeadTiles, q_RHD: Tensor, width: int) -> DecodeWorkspace:
        return DecodeWorkspace(
            self._library,
            q_RHD.device,
            q_RHD.dtype,
            q_RHD.shape[2],
            max_rows=len(q_RHD),
            max_tiles=tiles.count,
            max_selecting=len(tiles.tile_of_selected_S),
            max_blocks=width,
        )


def _words(rows: int, heads: int, width: int, device: torch.device) -> Tensor:
    """Masks as bits, 32 blocks a word."""
    return torch.empty((rows, heads, -(-width // 32)), dtype=torch.int32, device=device)
