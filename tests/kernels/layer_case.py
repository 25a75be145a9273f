"""A whole layer at decode, random: head roles, both pools, index keys; NaN where nothing is stored.

Made at once instead of token by token, so that contexts may be long. What the kernels make of it is
checked in `layer_check`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels._launch import KernelLibrary
from kernels.block_age import AGE_RANGES
from kernels.cuda_decode import attend
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

    def with_selection(self, **changes: object) -> LayerCase:
        assert self.selection is not None
        return replace(self, selection=replace(self.selection, **changes))  # type: ignore[arg-type]


def with_int8_keys(selection: Selection) -> Selection:
    """The same index keys in 8 bits; 127 where nothing is stored, with scales of NaN."""
    keys = selection.index_cache
    steps, scales = quantise_index_keys(keys.flatten(0, 1))
    steps = steps.view(keys.shape).masked_fill(keys.isnan(), 127)
    return replace(selection, index_cache=steps, index_scales=scales.view(keys.shape[:3]))
