"""Top-p against top-k at the same cost: count the blocks that one takes, give them to the other.

Both are rules in the sense of `engine.model.attention.BlockSelection`, one for each layer.

Shapes: R decode rows, H retrieval heads of the layer, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from kernels.indexer import inside_and_forced, select_blocks


class CountedSelection:
    """The rule that serves, and how many blocks each head has taken by it."""

    def __init__(self) -> None:
        self._blocks_H: Tensor | None = None
        self._rows_H: Tensor | None = None

    def __call__(
        self, log_mass_RHB: Tensor, top_p_RH: Tensor, context_lens_R: Tensor, block_tokens: int
    ) -> Tensor:
        mask_RHB = select_blocks(log_mass_RHB, top_p_RH, context_lens_R, block_tokens)
        selects_RH = top_p_RH < 1  # 1 keeps every block: nothing was selected
        blocks_H = (mask_RHB.sum(-1) * selects_RH).sum(0)
        rows_H = selects_RH.sum(0)
        self._blocks_H = blocks_H if self._blocks_H is None else self._blocks_H + blocks_H
        self._rows_H = rows_H if self._rows_H is None else self._rows_H + rows_H
        return mask_RHB

    def means(self) -> list[float]:
        """Blocks per row of each head so far; 0 for one that has never selected."""
        if self._blocks_H is None or self._rows_H is None:
            return []
        mean_H = self._blocks_H.double() / self._rows_H.clamp(min=1)
        return [round(mean, 4) for mean in mean_H.tolist()]


class FixedBlocks:
    """Top-k: each head keeps a number of blocks, those of the most mass, whatever the mass is.

    The first block and the last two are among them, as with top-p; a row never has fewer.
    """

    def __init__(self, means: Sequence[float]) -> None:
        """
        Args:
            means: blocks of each head, rounded up here.
        """
        self.blocks = [max(1, ceil(mean)) for mean in means]

    def __call__(
        self, log_mass_RHB: Tensor, top_p_RH: Tensor, context_lens_R: Tensor, block_tokens: int
    ) -> Tensor:
        """Blocks to attend, bool [R, H, B]; arguments as `kernels.indexer.select_blocks`."""
        device, width = log_mass_RHB.device, log_mass_RHB.shape[-1]
        inside_RB, forced_RB = inside_and_forced(context_lens_R, width, block_tokens)
        ranked_RHB = log_mass_RHB.masked_fill(forced_RB.unsqueeze(1), float("inf"))
        order_RHK = ranked_RHB.topk(min(max(self.blocks), width), dim=-1).indices
        rank_K = torch.arange(order_RHK.shape[-1], device=device)
        blocks_H = torch.tensor(self.blocks, device=device)
        counted_RHK = (rank_K < blocks_H.unsqueeze(1)).expand_as(order_RHK)
        chosen_RHB = torch.zeros_like(log_mass_RHB, dtype=torch.bool)
        chosen_RHB.scatter_(-1, order_RHK, counted_RHK)
        everything_RH1 = (top_p_RH >= 1).unsqueeze(-1)
        return (chosen_RHB | forced_RB.unsqueeze(1) | everything_RH1) & inside_RB.unsqueeze(1)
