"""Rows in which a head looks far: past the blocks that selection keeps whatever the index says.

Some heads look near almost always and far at a few tokens, on which a whole answer may hang (of a
list, the digits that tell which of its lines comes next). Means over rows hide whether an index
finds what such a head looks for: it could keep 99 % of the attention and never select anything.

Shapes: R sampled rows, T tokens, B blocks.
"""

from __future__ import annotations

from torch import Tensor

from conversion.index_loss import block_log_mass
from kernels.indexer import inside_and_forced

FAR = 0.5  # of a row's attention, past what is always kept: the head looks far


def far_mass(log_attention_RT: Tensor, rows_R: Tensor, block_tokens: int) -> Tensor:
    """Share of the attention past the blocks of the sinks, of the row and before it, [R].

    Args:
        log_attention_RT: true log-probabilities, -inf past each row's position.
        rows_R: position of each row.
    """
    mass_RB = block_log_mass(log_attention_RT, block_tokens).exp()
    _, forced_RB = inside_and_forced(rows_R + 1, mass_RB.shape[1], block_tokens)
    return mass_RB.masked_fill(forced_RB, 0.0).sum(1)


def row_weights(far_R: Tensor, far_share: float) -> Tensor:
    """Weights of rows in a mean, [R], sum 1: up to `far_share` of it goes to rows that look far.

    Less where there is not one row's attention of it in all: what a near head sees far is noise.
    """
    total = far_R.sum()
    far_share_R = far_share * far_R / (total + 1)
    return far_share_R + (1 - far_share_R.sum()) / len(far_R)
