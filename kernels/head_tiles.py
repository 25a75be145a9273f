"""Query heads of a layer by the KV head they share, in the form that the CUDA kernels read.

A tile is a KV head and at most 16 of the query heads that read it: its keys and values are read
once for all of them, whatever their roles. Or roles have tiles of their own, see `make`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels._args import GROUP_WORDS, TILE_HEADS

Pool = Literal["full", "window"]


class HeadRole(NamedTuple):
    """What one query head reads."""

    pool: Pool
    kv_row: int  # row of its KV head in that pool's cache
    retrieval: bool  # the whole context or what was selected; else window and sinks
    selected: int | None = None  # its row among the heads of the layer that select blocks


@dataclass(frozen=True, slots=True)
class HeadTiles:
    """G tiles of a layer of H query heads, S of which select blocks.

    groups: int32 [G, 36], `Group` of `csrc/args.h`.
    tile_of_selected_S: int32, the tile of each head that selects.
    most_heads: of a tile.
    """

    groups: Tensor
    tile_of_selected_S: Tensor
    num_heads: int
    most_heads: int

    @classmethod
    def make(
        cls, roles: Sequence[HeadRole], device: torch.device, *, split_roles: bool = False
    ) -> HeadTiles:
        """
        Args:
            roles: of query heads 0, 1, ... of the layer.
            split_roles: heads of both roles on one KV head go to tiles of their own. The few blocks
                that both read are read twice; in return local heads need not wait for a selection.

        Raises:
            ValueError: no heads, or those that select are not numbered 0, 1, ...
        """
        if not roles:
            raise ValueError("a layer needs query heads")
        by_kv: dict[tuple[Pool, int, bool], list[int]] = {}
        for head, role in enumerate(roles):
            key = (role.pool, role.kv_row, split_roles and role.retrieval)
            by_kv.setdefault(key, []).append(head)
        tiles = [
            heads[start : start + TILE_HEADS]
            for heads in by_kv.values()
            for start in range(0, len(heads), TILE_HEADS)
        ]
        tile_of: dict[int, int] = {}
        for tile, heads in enumerate(tiles):
            for head in heads:
                row = roles[head].selected
                if row is not None:
                    tile_of[row] = tile
        selecting = sum(role.selected is not None for role in roles)
        if sorted(tile_of) != list(range(selecting)):
            raise ValueError("heads that select blocks must be numbered 0, 1, ... without gaps")
        return cls(
            torch.tensor([_group(roles, heads) for heads in tiles], dtype=torch.int32).to(device),
            torch.tensor([tile_of[i] for i in range(selecting)], dtype=torch.int32).to(device),
            len(roles),
            max(map(len, tiles)),
        )

    @property
    def count(self) -> int:
        return self.groups.shape[0]


def _group(roles: Sequence[HeadRole], heads: list[int]) -> list[int]:
    """The words of one `Group`."""
    padding = [0] * (TILE_HEADS - len(heads))
    first = roles[heads[0]]
    retrieval = sum(roles[head].retrieval << slot for slot, head in enumerate(heads))
    selected = [roles[head].selected for head in heads]
    words = [int(first.pool == "window"), first.kv_row, len(heads), retrieval, *heads, *padding]
    words += [-1 if row is None else row for row in selected] + [-1 for _ in padding]
    assert len(words) == GROUP_WORDS
    return words
