"""What an index adds for the age of a block: to the scores of a fit, and without gradient steps.

A bias is added to the score of every token of a block, which adds it to the block's log mass: what
serving does (`kernels.block_age`). Ages count from the block of the query.

With fixed scores the best biases are those that give every range of ages, on average over queries,
the share of attention that it has. Iterative scaling (Darroch and Ratcliff, 1972) comes to them:
each round adds log(share that attention has / share that the index has), and the KL never grows.
Of an index nothing but its log mass by range is needed for it, so documents are read once.

Shapes: R query rows, T keys, B blocks, W = B times the tokens of one, A = AGE_RANGES,
X any number of heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conversion.index_loss import HIDDEN
from conversion.parallel import Ranks
from kernels.block_age import AGE_RANGES, row_ranges

ROUNDS = 100
LEAST_SHARE = 1e-6  # that a range counts as having at least: a bias stays finite


def ages_of_blocks(rows_R: Tensor, blocks: int, block_tokens: int) -> Tensor:
    """Which range each block is in, float32 [R, B, A], one 1 a block.

    A product with it, summed, is exact, and its gradient is a sum that is the same every time.
    """
    ranges_RB = row_ranges(rows_R + 1, blocks, block_tokens)
    return (ranges_RB[..., None] == torch.arange(AGE_RANGES, device=rows_R.device)).float()


def with_age_bias(scores_RW: Tensor, bias_A: Tensor, rows_R: Tensor, block_tokens: int) -> Tensor:
    """Token scores with the bias of their block's range, [R, W].

    Args:
        scores_RW: of whole blocks of keys.
        rows_R: position of each query.
    """
    scores_RBK = scores_RW.view(len(scores_RW), -1, block_tokens)
    ages_RBA = ages_of_blocks(rows_R, scores_RBK.shape[1], block_tokens)
    return (scores_RBK + (ages_RBA * bias_A).sum(-1, keepdim=True)).flatten(1)


def range_log_mass(log_mass_RB: Tensor, rows_R: Tensor, block_tokens: int) -> Tensor:
    """Logsumexp over the blocks of each range, [R, A]; HIDDEN where there is none."""
    ages_RBA = ages_of_blocks(rows_R, log_mass_RB.shape[1], block_tokens)
    apart_RBA = log_mass_RB[..., None].where(ages_RBA > 0, float("-inf"))
    return apart_RBA.logsumexp(1).clamp(min=HIDDEN)


def balanced(
    index_XRA: Tensor,
    attention_XRA: Tensor,
    ranks: Ranks,
    before_XA: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Biases that make the index's mean share of every range that of attention, float32 [..., A].

    Args:
        index_XRA: log mass by range, up to a constant per query; of any number of heads.
        attention_XRA: log-probability by range, of the same queries; it may have fewer heads, as
            far as broadcasting goes.
        ranks: the processes that have other queries each; all get the same.
        before_XA: biases that `index_XRA` has already; the result is with them.
        first: ranges below it keep their biases, up to a constant.
    """
    reached_A = ranks.summed((index_XRA > HIDDEN).any(-2).flatten(0, -2).sum(0)) > 0
    rows = ranks.total([index_XRA.shape[-2]])[0]

    def log_share(shares_XRA: Tensor) -> Tensor:
        mean_XA = ranks.summed(shares_XRA.sum(-2)) / rows
        return mean_XA.clamp(min=LEAST_SHARE).log()

    index_XRA = index_XRA.double()
    wanted_XA = log_share(attention_XRA.double().exp())
    bias_XA = index_XRA.new_zeros((*index_XRA.shape[:-2], AGE_RANGES))
    moving_A = reached_A & (torch.arange(AGE_RANGES, device=bias_XA.device) >= first)
    for _ in range(ROUNDS):
        share_XA = log_share((index_XRA + bias_XA.unsqueeze(-2)).softmax(-1))
        bias_XA = torch.where(moving_A, bias_XA + wanted_XA - share_XA, bias_XA)
    if before_XA is not None:
        bias_XA = bias_XA + before_XA.to(bias_XA)
    return settled(bias_XA.float(), int(reached_A.nonzero().max()))


def settled(bias_XA: Tensor, last: int) -> Tensor:
    """The same with 0 in the range `last`: only differences count.

    Ranges past it are those of longer contexts than any that was seen; they get what `last` has, 0.
    """
    ranges_A = torch.arange(AGE_RANGES, device=bias_XA.device)
    return (bias_XA - bias_XA[..., last, None]).where(ranges_A <= last, 0.0)
