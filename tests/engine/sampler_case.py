"""Requests and logits for tests of the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine.request import Request, SamplingParams
from engine.sampler import Sampler
from engine.step import Sample

VOCAB = 37
EOS = 2


def make_request(
    request_id: int = 1,
    *,
    prompt: Sequence[int] = (5, 6),
    output: Sequence[int] = (),
    temperature: float = 1.0,
    **params: Any,
) -> Request:
    sampling = SamplingParams(temperature=temperature, **params)
    return Request(request_id, list(prompt), sampling, output=list(output))


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def sample_one(logits_V: torch.Tensor, request: Request) -> Sample:
    (sample,) = Sampler([EOS]).sample(logits_V[None].clone(), [request])
    return sample
