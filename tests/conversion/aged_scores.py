"""Scores of a head that looks by age: rows of a document, and biases that are to be found."""

from __future__ import annotations

import torch
from torch import Tensor

from conversion.age_bias import range_log_mass
from conversion.index_loss import block_log_mass

BLOCK, BLOCKS = 8, 40
TOKENS = BLOCK * BLOCKS
ROWS = torch.arange(5, TOKENS, 7)
PLANTED = torch.tensor([6.0, 4.5, 4.0, 3.0, 1.0, 0.5, 0.0, *(0.0,) * 9])  # 39 is in range 6


def hidden(scores_RT: Tensor) -> Tensor:
    """With -inf at keys to come."""
    return scores_RT.masked_fill(torch.arange(TOKENS) > ROWS[:, None], float("-inf"))


def by_range(log_RT: Tensor) -> Tensor:
    return range_log_mass(block_log_mass(log_RT, BLOCK), ROWS, BLOCK)
