"""From logits to tokens: every row of a batch by its own parameters, whatever the others ask.

Order of operations, as in the OpenAI and Hugging Face interfaces:

    logit bias -> repetition, presence, frequency penalty -> mask of stop ids before min_tokens
    -> greedy: argmax, lowest id on ties
    -> else: temperature -> top-k -> top-p -> min-p -> inverse CDF at the row's counter-based draw

Probabilities are summed as fixed-point integers (the largest one is 2^40). Integer sums do not
depend on order or on the shape of the batch, so neither does the chosen token, and top-p never
loses a token to rounding. A token less probable than 2^-40 of the first is never drawn.

Legend: R rows, V logits width, N tokens reported with log-probabilities.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from engine.counter_rng import uniform
from engine.messages import TokenLogprobs
from engine.request import Request, SamplingParams
from engine.step import Sample

_ONE = 2.0**40  # weight of the most probable token; V * 2^40 fits int64 up to V = 2^22
_MASKED = torch.finfo(torch.float32).min  # finite: a row with every token masked stays a number


class Sampler:
    """Chooses tokens. Keeps nothing but the distinct prompt ids of requests that need them."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos = tuple(eos_token_ids)
        self._prompt_ids: dict[int, list[int]] = {}

    def forget(self, request_id: int) -> None:
        """Drop what is kept for a request that ended."""
        self._prompt_ids.pop(request_id, None)

    def sample(self, logits_RV: torch.Tensor, requests: Sequence[Request]) -> list[Sample]:
        """The next token of each request.

        Args:
            logits_RV: float32, any device; overwritten where a row asks for changes.
            requests: the owner of each row; `len(request.output)` is the index of the draw.
        """
        finite = finite_rows(logits_RV).tolist()
        if not all(finite):
            logits_RV[[row for row, ok in enumerate(finite) if not ok]] = 0.0  # dropped below
        logprobs = self._raw_logprobs(logits_RV, requests)
        for row, request in enumerate(requests):
            self._adjust(logits_RV[row], request)
        tokens = logits_RV.argmax(dim=-1).tolist()
        drawn = [r for r, request in enumerate(requests) if request.params.temperature > 0]
        for restricted in (False, True):
            rows = [r for r in drawn if _is_restricted(requests[r].params) == restricted]
            if rows:
                draw = _draw_restricted if restricted else _draw_plain
                chosen = draw(logits_RV[rows], [requests[r] for r in rows])
                for row, token in zip(rows, chosen, strict=True):
                    tokens[row] = token
        return [
            Sample(token, _select_logprobs(logprobs.get(row), token, requests[row].params.logprobs))
            if ok
            else Sample(None)
            for row, (token, ok) in enumerate(zip(tokens, finite, strict=True))
        ]

    def _raw_logprobs(
        self, logits_RV: torch.Tensor, requests: Sequence[Request]
    ) -> dict[int, torch.Tensor]:
        """Log-softmax of the unchanged logits of the rows that report it, by row."""
        rows = [r for r, request in enumerate(requests) if request.params.logprobs is not None]
        if not rows:
            return {}
        return dict(zip(rows, torch.log_softmax(logits_RV[rows], dim=-1), strict=True))

    def _adjust(self, logits_V: torch.Tensor, request: Request) -> None:
        """Apply bias, penalties and the mask of stop ids in place; most requests have none."""
        params = request.params
        if params.logit_bias:
            ids = _index(list(params.logit_bias), logits_V)
            logits_V[ids] += logits_V.new_tensor(list(params.logit_bias.values()))
        if params.repetition_penalty != 1.0:
            ids = _index(sorted({*self._distinct_prompt(request), *request.output}), logits_V)
            seen = logits_V[ids]
            factor = params.repetition_penalty
            logits_V[ids] = torch.where(seen > 0, seen / factor, seen * factor)
        if request.output and (params.presence_penalty or params.frequency_penalty):
            counts = Counter(request.output)
            times = logits_V.new_tensor(list(counts.values()))
            penalties = params.presence_penalty + params.frequency_penalty * times
            logits_V[_index(list(counts), logits_V)] -= penalties
        if len(request.output) < params.min_tokens:
            stops = [*params.stop_token_ids, *(() if params.ignore_eos else self._eos)]
            logits_V[_index(stops, logits_V)] = _MASKED

    def _distinct_prompt(self, request: Request) -> list[int]:
        """Found once per request: a prompt may have a million tokens."""
        ids = self._prompt_ids.get(request.request_id)
        if ids is None:
            ids = self._prompt_ids[request.request_id] = sorted(set(request.prompt))
        return ids


def finite_rows(logits_RV: torch.Tensor) -> torch.Tensor:
    """Whether all logits of a row are finite: bool [R]. One pass; NaN carries through min/max."""
    low_R, high_R = torch.aminmax(logits_RV, dim=-1)
    return low_R.isfinite() & high_R.isfinite()


def top_logprobs(logprobs_V: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """The log-probability of `token` and the `count` most probable ids, lowest id first on ties."""
    count = min(count, logprobs_V.shape[-1])
    values, ids = logprobs_V.topk(count)
    ranked = sorted(zip(values.tolist(), ids.tolist(), strict=True), key=lambda x: (-x[0], x[1]))
    return TokenLogprobs(
        token_id=token,
        logprob=float(logprobs_V[token]),
        top_ids=[token_id for _, token_id in ranked],
        top_logprobs=[value for value, _ in ranked],
    )


def _select_logprobs(
    logprobs_V: torch.Tensor | None, token: int, count: int | None
) -> TokenLogprobs | None:
    if logprobs_V is None or count is None:
        return None
    return top_logprobs(logprobs_V, token, count)


def _is_restricted(params: SamplingParams) -> bool:
    """Whether only some of the most probable tokens may be drawn."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _weights(logits_RV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Probabilities at each row's temperature in fixed point: int64 [R, V], maximum 2^40.

    The maximum is taken off before dividing, so that no temperature can overflow. Equal logits
    give equal weights at any place of any batch: exp is taken element by element in float64.
    """
    temperature_R1 = logits_RV.new_tensor([[r.params.temperature] for r in requests]).double()
    shifted_RV = logits_RV.double() - logits_RV.amax(dim=-1, keepdim=True)
    return ((shifted_RV / temperature_R1).exp() * _ONE).long()


def _draw_plain(logits_RV: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """Inverse CDF over all tokens in id order."""
    cumulative_RV = _weights(logits_RV, requests).cumsum(dim=-1)
    ranks: list[int] = _invert(cumulative_RV, cumulative_RV[:, -1:], requests).flatten().tolist()
    return ranks


def _draw_restricted(logits_RV: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """Inverse CDF over the tokens that top-k, top-p and min-p leave, most probable first.

    Each of the three keeps a prefix of that order, so together they keep the shortest prefix.
    """
    sorted_RV, ids_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    weights_RV = _weights(sorted_RV, requests)
    cumulative_RV = weights_RV.cumsum(dim=-1)
    last_R1 = _kept(weights_RV, cumulative_RV, requests) - 1
    rank_R1 = _invert(cumulative_RV, cumulative_RV.gather(1, last_R1), requests)
    tokens: list[int] = ids_RV.gather(1, rank_R1).flatten().tolist()
    return tokens


def _kept(
    weights_RV: torch.Tensor, cumulative_RV: torch.Tensor, requests: Sequence[Request]
) -> torch.Tensor:
    """How many of the most probable tokens stay: int64 [R, 1], at least 1.

    top-p is a share of what top-k left, min-p of the first token's probability.
    """
    width = weights_RV.shape[-1]
    params = [request.params for request in requests]
    top_k_R1 = weights_RV.new_tensor([[min(p.top_k or width, width)] for p in params])
    top_p_R1 = weights_RV.new_tensor([[p.top_p] for p in params], dtype=torch.float64)
    min_p_R1 = weights_RV.new_tensor([[p.min_p] for p in params], dtype=torch.float64)
    enough_R1 = top_p_R1 * cumulative_RV.gather(1, top_k_R1 - 1)
    by_top_p_R1 = (cumulative_RV < enough_R1).sum(dim=-1, keepdim=True) + 1
    by_min_p_R1 = (weights_RV >= min_p_R1 * _ONE).sum(dim=-1, keepdim=True)
    return torch.minimum(top_k_R1, torch.minimum(by_top_p_R1, by_min_p_R1)).clamp_min(1)


def _invert(
    cumulative_RV: torch.Tensor, total_R1: torch.Tensor, requests: Sequence[Request]
) -> torch.Tensor:
    """First column whose cumulative weight exceeds draw * total: int64 [R, 1]."""
    draws = [[uniform(request.params.seed, len(request.output))] for request in requests]
    draws_R1 = cumulative_RV.new_tensor(draws, dtype=torch.float64)
    target_R1 = torch.minimum((draws_R1 * total_R1).long(), total_R1 - 1)
    return torch.searchsorted(cumulative_RV, target_R1, right=True)


def _index(ids: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=like.device)
