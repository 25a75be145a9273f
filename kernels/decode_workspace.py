"""Device memory that the decode kernels write to between their inputs and their outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._args import (
    CHUNK_COLUMNS,
    ENTRY_WORDS,
    FEW_ITEMS,
    MAX_BLOCKS,
    MAX_RANKS,
    TILE_HEADS,
    DecodePlan,
)
from kernels._launch import KernelLibrary
from kernels.head_tiles import HeadTiles


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
        self._plans = [library.decode_plan(device, dtype, head_dim, wide=w) for w in (False, True)]
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
        self.item_done = ints(rows * max_tiles * MAX_RANKS)
        parts = 4 * max(plan.ctas for plan in self._plans) + 2 * FEW_ITEMS
        self.partial = floats(parts, TILE_HEADS, head_dim)
        self.partial_stats = floats(parts, TILE_HEADS, head_dim // CHUNK_COLUMNS, 2)

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def plan(self, tiles: HeadTiles) -> DecodePlan:
        """How attention of these tiles is launched."""
        return self._plans[tiles.most_heads > 8]

    def check(self, rows: int, tiles: int, selecting: int, blocks: int) -> None:
        """Raises ValueError if a launch needs more than was made."""
        names = ("rows", "tiles", "selecting heads", "blocks")
        sizes = (rows, tiles, selecting, blocks)
        for name, size, limit in zip(names, sizes, self.limits, strict=True):
            if size > limit:
                raise ValueError(f"{size} {name}; the workspace was made for {limit}")
