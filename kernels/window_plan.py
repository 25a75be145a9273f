"""Which blocks a decode row reads under the window rule, and which of their tokens it sees.

The same for every layer of a step, so whoever computes many layers makes it once.

Shapes: R decode rows, M blocks read by a row, S = M * block_tokens, B block-table width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Blocks to gather for every row.

    block_RM: int64 logical blocks, in no particular order, padded with block 0.
    unseen_RS: bool, tokens of these blocks that the row's query does not see; padding whole.
    """

    block_RM: Tensor
    unseen_RS: Tensor

    @classmethod
    def of_window(
        cls, context_lens_R: Tensor, block_tokens: int, width: int, window: int, sinks: int
    ) -> WindowPlan:
        """The last `window` tokens and the first `sinks`, at most a block.

        Args:
            context_lens_R: int64, position of each query + 1.
            width: B of the block tables that it is for.
        """
        live = min(-(-window // block_tokens) + 1, width)
        last_R1 = ((context_lens_R - 1) // block_tokens)[:, None]
        # Newest blocks first, then the block of the sinks where the window does not reach it.
        block_RM = last_R1 - torch.arange(live, device=context_lens_R.device)
        sink_R1 = torch.where(last_R1 >= live, 0, -1)
        block_RM = torch.cat((block_RM, sink_R1), dim=1)
        return cls._of_blocks(block_RM, context_lens_R, block_tokens, window, sinks)

    @classmethod
    def of_context(cls, context_lens_R: Tensor, block_tokens: int) -> WindowPlan:
        """The whole context."""
        widest = -(-int(context_lens_R.max()) // block_tokens)
        block_B = torch.arange(widest, device=context_lens_R.device)
        block_RB = block_B.expand(len(context_lens_R), -1)
        return cls._of_blocks(block_RB, context_lens_R, block_tokens, widest * block_tokens, 0)

    @classmethod
    def _of_blocks(
        cls, block_RM: Tensor, context_lens_R: Tensor, block_tokens: int, window: int, sinks: int
    ) -> WindowPlan:
        offsets_K = torch.arange(block_tokens, device=block_RM.device)
        positions_RS = (block_RM[..., None] * block_tokens + offsets_K).flatten(1)
        newest_R1 = context_lens_R[:, None] - 1
        near_RS = (newest_R1 - positions_RS < window) | (positions_RS < sinks)
        seen_RS = near_RS & (positions_RS <= newest_R1) & (positions_RS >= 0)
        return cls(block_RM.clamp(min=0), ~seen_RS)
