"""A whole layer at decode, random: head roles, both pools, index keys; NaN where nothing is stored.

Made at once instead of token by token, so that contexts may be long. Truth is what the PyTorch ops
of `kernels.decode` and `kernels.indexer` give in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import decode, indexer
from kernels._launch import KernelLibrary
from kernels.block_age import AGE_RANGES
from kernels.cuda_decode import attend
from kernels.cuda_ops import CudaOps
from kernels.decode_inputs import PagedPool, Selection, WindowRule
from kernels.decode_workspace import DecodeWorkspace
from kernels.head_tiles import HeadRole, HeadTiles
from kernels.paged_kv import quantise_index_keys

HEAD_MAPS: dict[str, list[HeadRole]] = {
    # Two full KV heads with one and two retrieval heads of four, one windowed KV head.
    "mixed": [
        HeadRole("full", 0, retrieval=False),
        HeadRole("full", 0, retrieval=True, selected=0),
        *[HeadRole("full", 0, retrieval=False)] * 2,
        *[HeadRole("window", 0, retrieval=False)] * 4,
        HeadRole("full", 1, retrieval=True, selected=2),
        *[HeadRole("full", 1, retrieval=False)] * 2,
        HeadRole("full", 1, retrieval=True, selected=1),
    ],
    "all-retrieval": [HeadRole("full", i // 2, retrieval=True, selected=i) for i in range(4)],
    "none-retrieval": [HeadRole("window", i // 3, retrieval=False) for i in range(6)],
    "one-head": [HeadRole("full", 0, retrieval=True, selected=0)],
    # More query heads on one KV head than a tile holds, both roles in both tiles.
    "twenty-on-one": [
        HeadRole("full", 0, retrieval=i % 9 == 4, selected=i // 9 if i % 9 == 4 else None)
        for i in range(20)
    ],
}


@dataclass(frozen=True, slots=True)
class LayerCase:
    """Everything that `cuda_decode.attend` takes; `selection` None: retrieval heads see all."""

    roles: list[HeadRole]
    tiles: HeadTiles
    q_RHD: Tensor
    full: PagedPool
    window: PagedPool
    lens_R: Tensor
    rule: WindowRule
    scale: float
    selection: Selection | None

    @classmethod
    def make(
        cls,
        lens: Sequence[int],
        head_map: str = "mixed",
        *,
        dtype: torch.dtype = torch.float32,
        block: int = 64,
        dim: int = 64,
        index_dim: int = 16,
        window: int = 96,
        sinks: int = 4,
        top_p: float = 0.5,
        dense_below: int = 0,
        indexed: bool = True,
        split_roles: bool = False,
        int8_index: bool = False,
        age_bias: bool = False,
        device: str = "cpu",
        seed: int = 0,
    ) -> LayerCase:
        """`lens`: context per row; 0 pads. Pages that slid out of the window are given back."""
        generator = torch.Generator(device).manual_seed(seed)
        roles = HEAD_MAPS[head_map]

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        lens_R = torch.tensor(lens, device=device)
        width = max(1, -(-max(lens) // block)) + 1  # one column more than any row needs
        block_B = torch.arange(width, device=device)
        used_RB = block_B * block < lens_R[:, None]
        first_R1 = ((lens_R - window).clamp(min=0) // block)[:, None]
        near_RB = used_RB & ((block_B >= first_R1) | (block_B * block < sinks))
        pages = torch.randperm(len(lens) * width, generator=generator, device=device) + 1
        tables_RB = pages.view(len(lens), width)

        def cache(heads: int, size: int, kept_RB: Tensor) -> Tensor:
            values = random(len(pages) + 1, heads, block, size)
            gone_P = torch.ones(len(pages) + 1, dtype=torch.bool, device=device)
            gone_P[tables_RB[kept_RB]] = False
            values[gone_P] = torch.nan
            for row, length in enumerate(lens):
                if length % block:
                    values[tables_RB[row, length // block], :, length % block :] = torch.nan
            return values.to(dtype)

        def pool(name: str, kept_RB: Tensor) -> PagedPool:
            heads = max([role.kv_row for role in roles if role.pool == name], default=0) + 1
            tables = tables_RB.masked_fill(~kept_RB, 0)
            return PagedPool(cache(heads, dim, kept_RB), cache(heads, dim, kept_RB), tables)

        selecting = sum(role.selected is not None for role in roles)
        selection = None
        if indexed and selecting:
            selection = Selection(
                # Scores spread over a few nats, so that a few blocks hold most of the mass.
                qi_RSI=(random(len(lens), selecting, index_dim) * 0.4).to(dtype),
                index_row_S=torch.randperm(selecting, generator=generator, device=device),
                index_cache=cache(selecting, index_dim, used_RB),
                top_p_S=torch.full((selecting,), top_p, device=device),
                own_top_p_R=None,
                dense_below=dense_below,
            )
            if int8_index:
                selection = with_int8_keys(selection)
            if age_bias:
                selection = replace(selection, age_bias_SA=2 * random(selecting, AGE_RANGES))
        return cls(
            roles=roles,
            tiles=HeadTiles.make(roles, torch.device(device), split_roles=split_roles),
            q_RHD=random(len(lens), len(roles), dim).to(dtype),
            full=pool("full", used_RB),
            window=pool("window", near_RB),
            lens_R=lens_R,
            rule=WindowRule(window, sinks),
            scale=dim**-0.5,
            selection=selection,
        )

    def workspace(self, library: KernelLibrary) -> DecodeWorkspace:
        rows, width = self.full.tables_RB.shape
        return DecodeWorkspace(
            library,
            self.q_RHD.device,
            self.q_RHD.dtype,
            self.q_RHD.shape[2],
            max_rows=rows,
            max_tiles=self.tiles.count,
            max_selecting=len(self.tiles.tile_of_selected_S),
            max_blocks=width,
        )

    def run(self, workspace: DecodeWorkspace) -> tuple[Tensor, Tensor | None]:
        """Output, NaN where nothing was written, and attended tokens [R, S], -1 likewise."""
        out_RHD = torch.full_like(self.q_RHD, torch.nan)
        attended_RS = None
        if self.selection is not None:
            attended_RS = self.lens_R.new_full(self.selection.qi_RSI.shape[:2], -1)
        used = {role.pool for role in self.roles}
        attend(
            workspace,
            self.tiles,
            self.q_RHD,
            out_RHD,
            self.full if "full" in used else None,
            self.window if "window" in used else None,
            self.lens_R,
            self.rule,
            self.scale,
            self.selection,
            attended_RS,
        )
        return out_RHD, attended_RS

    def selected(self, ops: CudaOps) -> Tensor | None:
        """Blocks that the ops' own scores select, bool [R, S, B]: scores differ in last digits."""
        if self.selection is None:
            return None
        given = self.selection
        pages = (self.full.tables_RB, self.lens_R, given.index_scales, given.age_bias_SA)
        log_mass = ops.score_blocks(given.qi_RSI, given.index_row_S, given.index_cache, *pages)
        top_p_RS = given.top_p_S.expand(log_mass.shape[:2])
        if given.own_top_p_R is not None:
            own_R1 = given.own_top_p_R[:, None]
            top_p_RS = torch.where(own_R1.isnan(), top_p_RS, own_R1)
        short_R1 = (self.lens_R < given.dense_below)[:, None]
        top_p_RS = top_p_RS.masked_fill(short_R1, 1.0)
        return indexer.select_blocks(log_mass, top_p_RS, self.lens_R, self.full.k_cache.shape[2])

    def truth(self, mask_RSB: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Output by the PyTorch ops in `dtype`; zeros in rows without a context."""
        live_R = self.lens_R > 0
        whole_RHD = torch.zeros_like(self.q_RHD, dtype=dtype)
        if not bool(live_R.any()):
            return whole_RHD
        lens_R, q_RHD = self.lens_R[live_R], self.q_RHD[live_R].to(dtype)
        out_RHD = torch.zeros_like(q_RHD)
        for pool, name in ((self.full, "full"), (self.window, "window")):
            caches = pool.k_cache.to(dtype), pool.v_cache.to(dtype)
            for retrieval in (False, True):
                found = [
                    (head, role)
                    for head, role in enumerate(self.roles)
                    if role.pool == name and role.retrieval is retrieval
                ]
                if not found:
                    continue
                heads = [head for head, _ in found]
                kv_row_H = torch.tensor([role.kv_row for _, role in found]).to(lens_R)
                args = (q_RHD[:, heads], kv_row_H, *caches, pool.tables_RB[live_R], lens_R)
                if not retrieval:
                    rule = (self.rule.window, self.rule.sinks)
                    out_RHD[:, heads] = decode.decode_windowed(*args, *rule, self.scale)
                elif mask_RSB is None:
                    out_RHD[:, heads] = decode.decode_dense(*args, self.scale)
                else:
                    rows = [role.selected for _, role in found]
                    mask_RHB = mask_RSB[live_R][:, rows]
                    out_RHD[:, heads] = decode.decode_sparse(*args, mask_RHB, self.scale)
        whole_RHD[live_R] = out_RHD
        return whole_RHD

    def with_selection(self, **changes: object) -> LayerCase:
        assert self.selection is not None
        return replace(self, selection=replace(self.selection, **changes))  # type: ignore[arg-type]


def with_int8_keys(selection: Selection) -> Selection:
    """The same index keys in 8 bits; 127 where nothing is stored, with scales of NaN."""
    keys = selection.index_cache
    steps, scales = quantise_index_keys(keys.flatten(0, 1))
    steps = steps.view(keys.shape).masked_fill(keys.isnan(), 127)
    return replace(selection, index_cache=steps, index_scales=scales.view(keys.shape[:3]))


def check_layer(case: LayerCase, library: KernelLibrary) -> None:
    """The kernels against truth; twice, since the first launch must leave the workspace usable."""
    workspace = case.workspace(library)
    out_RHD, attended_RS = case.run(workspace)
    mask_RSB = case.selected(CudaOps(library))
    truth_RHD = case.truth(mask_RSB)
    worst = float((out_RHD.float() - truth_RHD).abs().max())
    if out_RHD.dtype == torch.float32:
        torch.testing.assert_close(out_RHD, truth_RHD, rtol=1e-4, atol=2e-6)
    else:
        twin_RHD = case.truth(mask_RSB, out_RHD.dtype).float()
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
