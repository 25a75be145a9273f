"""Ages of blocks, and what an indexer adds to a block's log mass for its age.

An index compares queries and keys before RoPE and cannot tell near from far, but a head may look
mostly near. Each head therefore has a bias for every range of ages, which double in length: the
query's own block, the one before it, 2 to 3 blocks back, 4 to 7, and so on. The range is the number
of bits of the age, `32 - __clz(age)` in CUDA. Shapes:

    R decode rows, H retrieval heads, B blocks of the widest row, A = AGE_RANGES
"""

from __future__ import annotations

import torch
from torch import Tensor

AGE_RANGES = 16  # the last one is open: ages from 2^14 blocks on


def age_ranges(age: Tensor) -> Tensor:
    """Range of each age in blocks, int64 of the same shape; what is newer than the query is new."""
    firsts = 2 ** torch.arange(AGE_RANGES - 1, device=age.device)  # ages at which a range begins
    return torch.bucketize(age, firsts, right=True)


def age_bias(bias_HA: Tensor, context_lens_R: Tensor, width: int, block_tokens: int) -> Tensor:
    """What is added to log masses, float32 [R, H, B].

    Args:
        bias_HA: float32, per head and range.
        context_lens_R: int64, tokens of each row; its query is the last of them.
        width: B, in blocks.
        block_tokens: tokens of a block.
    """
    return bias_HA[:, row_ranges(context_lens_R, width, block_tokens)].transpose(0, 1)


def row_ranges(context_lens_R: Tensor, width: int, block_tokens: int) -> Tensor:
    """Range of every block's age, int64 [R, B]; arguments as `age_bias`."""
    newest_R = (context_lens_R - 1).div(block_tokens, rounding_mode="floor")
    return age_ranges(newest_R[:, None] - torch.arange(width, device=newest_R.device))
