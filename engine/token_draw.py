"""Drawing tokens from logits: the same token for the same numbers, on any device, in any batch.

    temperature -> top-k -> top-p -> min-p -> inverse CDF at the row's counter-based draw

Probabilities are summed as fixed-point integers (the largest one is 2^40). Integer sums do not
depend on order or on the shape of the batch, so neither does the chosen token, and top-p never
loses a token to rounding. A token less probable than 2^-40 of the first is never drawn.

Legend: R rows, V logits width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.counter_rng import uniform
from engine.request import Request, SamplingParams
from engine.transfer import upload

_COLDEST = 1e-30  # what float32 rounds to 0 would make the first token 0 / 0
_ONE = 2.0**40  # weight of the most probable token; V * 2^40 fits int64 up to V = 2^22


class Draw(NamedTuple):
    """A token to choose: whose, and which of its generated tokens it is, from 0.

    `len(request.output)` does not tell that while the step before it is still to be read.
    """

    request: Request
    place: int


def is_restricted(params: SamplingParams) -> bool:
    """Whether only some of the most probable tokens may be drawn."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def draw_plain(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Tokens, int64 [R], by inverse CDF over all tokens in id order."""
    cumulative_RV = _weights(logits_RV, draws).cumsum(dim=-1)
    return _invert(cumulative_RV, cumulative_RV[:, -1:], draws).squeeze(1)


def draw_restricted(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Tokens, int64 [R], over those that top-k, top-p and min-p leave, most probable first.

    Each of the three keeps a prefix of that order, so together they keep the shortest prefix.
    """
    sorted_RV, ids_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    weights_RV = _weights(sorted_RV, draws)
    cumulative_RV = weights_RV.cumsum(dim=-1)
    last_R1 = _kept(weights_RV, cumulative_RV, draws) - 1
    rank_R1 = _invert(cumulative_RV, cumulative_RV.gather(1, last_R1), draws)
    return ids_RV.gather(1, rank_R1).squeeze(1)


def _weights(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Probabilities at each row's temperature in fixed point: int64 [R, V], maximum 2^40.

    The maximum is taken off before dividing, so that no temperature can overflow. Equal logits
    give equal weights at any place of any batch: exp is taken element by element in float64.
    """
    temperatures = [request.params.temperature for request, _ in draws]
    temperature_R1 = upload(temperatures, torch.float32, logits_RV.device).double().unsqueeze(1)
    temperature_R1.clamp_(min=_COLDEST)
    shifted_RV = logits_RV.double() - logits_RV.amax(dim=-1, keepdim=True)
    return ((shifted_RV / temperature_R1).exp() * _ONE).long()


def _kept(weights_RV: Tensor, cumulative_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """How many of the most probable tokens stay: int64 [R, 1], at least 1.

    top-p is a share of what top-k left, min-p of the first token's probability.
    """
    width, device = weights_RV.shape[-1], weights_RV.device
    params = [request.params for request, _ in draws]
    top_ks = [min(p.top_k or width, width) for p in params]
    top_k_R1 = upload(top_ks, torch.int64, device).unsqueeze(1)
    top_p_R1 = upload([p.top_p for p in params], torch.float64, device).unsqueeze(1)
    min_p_R1 = upload([p.min_p for p in params], torch.float64, device).unsqueeze(1)
    enough_R1 = top_p_R1 * cumulative_RV.gather(1, top_k_R1 - 1)
    by_top_p_R1 = (cumulative_RV < enough_R1).sum(dim=-1, keepdim=True) + 1
    by_min_p_R1 = (weights_RV >= min_p_R1 * _ONE).sum(dim=-1, keepdim=True)
    return torch.minimum(top_k_R1, torch.minimum(by_top_p_R1, by_min_p_R1)).clamp_min(1)


def _invert(cumulative_RV: Tensor, total_R1: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Rank of the first token whose cumulative weight exceeds each row's draw: int64 [R, 1]."""
    drawn = [uniform(request.params.seed, place) for request, place in draws]
    drawn_R1 = upload(drawn, torch.float64, cumulative_RV.device).unsqueeze(1)
    target_R1 = torch.minimum((drawn_R1 * total_R1).long(), total_R1 - 1)
    return torch.searchsorted(cumulative_RV, target_R1, right=True)
