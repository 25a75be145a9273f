"""Changes to logits that requests ask for: bias, penalties, ids masked before min_tokens.

All rows of a batch together: what to change is listed on the host, changed on the device.

Legend: R rows, V logits width, M changed places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.request import Request
from engine.token_draw import Draw
from engine.transfer import upload

_MASKED = torch.finfo(torch.float32).min  # finite: a row with every token masked stays a number
_LARGEST = torch.finfo(torch.float32).max


@dataclass(slots=True)
class _Places:
    """Places of one kind of change, no place twice, with the numbers that belong to each."""

    rows: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    numbers: list[list[float]] = field(default_factory=list)

    def add(self, row: int, token: int, *numbers: float) -> None:
        self.rows.append(row)
        self.ids.append(token)
        self.numbers.append(list(numbers))

    def on(self, device: torch.device) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
        """Index [M], [M] and float32 numbers, [M] each."""
        rows, ids = (upload(values, torch.int64, device) for values in (self.rows, self.ids))
        columns = zip(*self.numbers, strict=True)
        return (rows, ids), [upload(column, torch.float32, device) for column in columns]


class LogitEdits:
    """Applies them; keeps the distinct prompt ids of requests with a repetition penalty."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos = tuple(eos_token_ids)
        self._prompt_ids: dict[int, list[int]] = {}

    def forget(self, request_id: int) -> None:
        """Drop what is kept for a request that ended."""
        self._prompt_ids.pop(request_id, None)

    def apply(self, logits_RV: Tensor, draws: Sequence[Draw]) -> None:
        """Change float32 logits in place: bias, then penalties, then masks.

        Of a request that penalises, all tokens before the one to draw are in its output.

        Numbers are tensors even where one would do: dividing by a tensor rounds alike everywhere,
        dividing by a number is a product with its inverse on a GPU.
        """
        bias, repeated, counted, masked = _Places(), _Places(), _Places(), _Places()
        for row, draw in enumerate(draws):
            self._collect(row, draw, bias, repeated, counted, masked)
        if bias.rows:
            at, (value_M,) = bias.on(logits_RV.device)
            logits_RV[at] += value_M
        if repeated.rows:
            at, (factor_M,) = repeated.on(logits_RV.device)
            seen_M = logits_RV[at]
            logits_RV[at] = torch.where(seen_M > 0, seen_M / factor_M, seen_M * factor_M)
        if bias.rows or repeated.rows:
            logits_RV.clamp_(-_LARGEST, _LARGEST)  # a sum or product may have left float32
        if counted.rows:
            at, (presence_M, frequency_M, times_M) = counted.on(logits_RV.device)
            logits_RV[at] -= presence_M + frequency_M * times_M
        if masked.rows:
            at, _ = masked.on(logits_RV.device)
            logits_RV.index_put_(at, logits_RV.new_full((), _MASKED))

    def _collect(
        self,
        row: int,
        draw: Draw,
        bias: _Places,
        repeated: _Places,
        counted: _Places,
        masked: _Places,
    ) -> None:
        """What one request asks for; most ask for nothing."""
        request, place = draw
        params = request.params
        for token, value in params.logit_bias.items():
            bias.add(row, token, value)
        if params.repetition_penalty != 1.0:
            for token in sorted({*self._distinct_prompt(request), *request.output}):
                repeated.add(row, token, params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            for token, times in Counter(request.output).items():
                counted.add(row, token, params.presence_penalty, params.frequency_penalty, times)
        if place < params.min_tokens:
            for token in {*params.stop_token_ids, *(() if params.ignore_eos else self._eos)}:
                masked.add(row, token)

    def _distinct_prompt(self, request: Request) -> list[int]:
        """Found once per request: a prompt may have a million tokens."""
        ids = self._prompt_ids.get(request.request_id)
        if ids is None:
            ids = self._prompt_ids[request.request_id] = sorted(set(request.prompt))
        return ids


def asks_for_edits(draw: Draw) -> bool:
    """Whether the logits of a token are changed."""
    params = draw.request.params
    return bool(params.logit_bias or params.penalises or draw.place < params.min_tokens)
