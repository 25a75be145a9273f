"""From logits to tokens: every row of a batch by its own parameters, whatever the others ask.

Order of operations, as in the OpenAI and Hugging Face interfaces:

    logit bias -> repetition, presence, frequency penalty -> mask of stop ids before min_tokens
    -> greedy: argmax, lowest id on ties
    -> else: temperature -> top-k -> top-p -> min-p -> inverse CDF at the row's counter-based draw

All of it is queued on the logits' device; the host waits once, when it reads the tokens.

Legend: R rows, V logits width, N tokens reported with log-probabilities, Q rows that report them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.logit_edits import LogitEdits, asks_for_edits
from engine.messages import TokenLogprobs
from engine.request import Request
from engine.step import Sample
from engine.token_draw import Draw, draw_plain, draw_restricted, is_restricted
from engine.transfer import Readback, upload


def is_plain_greedy(draw: Draw) -> bool:
    """Whether a token is the argmax of its logits, and nothing else is asked."""
    params = draw.request.params
    return params.temperature == 0 and params.logprobs is None and not asks_for_edits(draw)


@dataclass(frozen=True, slots=True)
class PendingSamples:
    """Samples on their way: places in a `Readback`, to be read when it was fetched."""

    requests: Sequence[Request]
    tokens: int
    finite: int
    rows: Sequence[int] | None = None  # of each request in these two; None: 0, 1, ...
    chosen_R: Tensor | None = None  # the tokens on the device, where the sampler chose them
    reports: int | None = None  # chosen, top log-probabilities and top ids of reporting rows

    def read(self, values: Sequence[Sequence[float]]) -> list[Sample]:
        """The sample of each request; its token is None where the logits were not finite."""
        rows = [r for r, request in enumerate(self.requests) if request.params.logprobs is not None]
        reports: dict[int, Sequence[float]] = {}
        if self.reports is not None:
            flat = values[self.reports]
            width = len(flat) // len(rows)
            reports = {row: flat[i * width : (i + 1) * width] for i, row in enumerate(rows)}
        at = range(len(self.requests)) if self.rows is None else self.rows
        tokens = [int(values[self.tokens][place]) for place in at]
        finite = [values[self.finite][place] for place in at]
        return [
            Sample(token, _report(reports.get(row), token, request)) if ok else Sample(None)
            for row, (token, ok, request) in enumerate(
                zip(tokens, finite, self.requests, strict=True)
            )
        ]


class Sampler:
    """Chooses tokens. Keeps nothing but what `LogitEdits` keeps of prompts."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._edits = LogitEdits(eos_token_ids)

    def forget(self, request_id: int) -> None:
        """Drop what is kept for a request that ended."""
        self._edits.forget(request_id)

    def sample(self, logits_RV: Tensor, requests: Sequence[Request]) -> list[Sample]:
        """The next token of each request, at once."""
        readback = Readback()
        draws = [Draw(request, len(request.output)) for request in requests]
        pending = self.queue(logits_RV, draws, readback)
        return pending.read(readback.fetch())

    def queue(self, logits_RV: Tensor, draws: Sequence[Draw], readback: Readback) -> PendingSamples:
        """Start choosing a token for each row; does not wait for the device.

        Args:
            logits_RV: float32, any device; overwritten where a row asks for changes.
            draws: what each row is for.
        """
        finite_R = finite_rows(logits_RV)
        logits_RV.masked_fill_(~finite_R.unsqueeze(1), 0.0)  # their tokens are not read
        requests = [draw.request for draw in draws]
        reporting = [r for r, request in enumerate(requests) if request.params.logprobs is not None]
        raw_QV = _pick(logits_RV, reporting).log_softmax(dim=-1) if reporting else None
        self._edits.apply(logits_RV, draws)
        tokens_R = _choose(logits_RV, draws)
        reports = None
        if raw_QV is not None:
            count = max(requests[row].params.logprobs or 0 for row in reporting)
            tokens_Q1 = _pick(tokens_R, reporting).unsqueeze(1)
            reports = readback.add(_gather_report(raw_QV, tokens_Q1, count))
        tokens, finite = readback.add(tokens_R), readback.add(finite_R)
        return PendingSamples(requests, tokens, finite, chosen_R=tokens_R, reports=reports)


def finite_rows(logits_RV: Tensor) -> Tensor:
    """Whether all logits of a row are finite: bool [R]. One pass; NaN carries through min/max."""
    low_R, high_R = torch.aminmax(logits_RV, dim=-1)
    return low_R.isfinite() & high_R.isfinite()


def top_logprobs(logprobs_V: Tensor, token: int, count: int) -> TokenLogprobs:
    """The log-probability of `token` and the `count` most probable ids, lowest id first on ties."""
    tokens_11 = torch.tensor([[token]], device=logprobs_V.device)
    return _ranked(_gather_report(logprobs_V[None], tokens_11, count)[0].tolist(), token, count)


def _choose(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Tokens, int64 [R]; rows of a kind are drawn together."""
    tokens_R = logits_RV.argmax(dim=-1)
    drawn = [r for r, (request, _) in enumerate(draws) if request.params.temperature > 0]
    for restricted, draw in ((False, draw_plain), (True, draw_restricted)):
        rows = [r for r in drawn if is_restricted(draws[r].request.params) == restricted]
        if rows:
            chosen = draw(_pick(logits_RV, rows), [draws[r] for r in rows])
            if len(rows) == len(draws):
                return chosen
            tokens_R[upload(rows, torch.int64, logits_RV.device)] = chosen
    return tokens_R


def _pick(values_R: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, ascending; the tensor itself where it is all of them."""
    if len(rows) == len(values_R):
        return values_R
    return values_R[upload(rows, torch.int64, values_R.device)]


def _gather_report(logprobs_QV: Tensor, tokens_Q1: Tensor, count: int) -> Tensor:
    """[Q, 1 + 2 N] float64: the token's log-probability, the N largest ones, and their ids."""
    top_QN, ids_QN = logprobs_QV.topk(min(count, logprobs_QV.shape[-1]))
    parts = (logprobs_QV.gather(1, tokens_Q1), top_QN, ids_QN)
    return torch.cat([part.double() for part in parts], dim=1)


def _report(values: Sequence[float] | None, token: int, request: Request) -> TokenLogprobs | None:
    count = request.params.logprobs
    return None if values is None or count is None else _ranked(values, token, count)


def _ranked(values: Sequence[float], token: int, count: int) -> TokenLogprobs:
    """A row of `_gather_report`, cut to `count` alternatives."""
    width = len(values) // 2
    tops = zip(values[1 : 1 + width], values[1 + width :], strict=True)
    ranked = sorted(tops, key=lambda pair: (-pair[0], pair[1]))[:count]
    return TokenLogprobs(
        token_id=token,
        logprob=values[0],
        top_ids=[int(token_id) for _, token_id in ranked],
        top_logprobs=[value for value, _ in ranked],
    )
