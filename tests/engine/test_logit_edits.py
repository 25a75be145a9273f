"""What changes logits before a token is drawn: penalties, biases, and stop ids that must wait."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from engine.sampler import Sampler
from tests.engine.sampler_case import EOS, VOCAB, make_request, random_logits, sample_one


def test_penalties_follow_their_published_formulas() -> None:
    logits = random_logits(1, seed=8)[0]
    request = make_request(
        prompt=[1, 1, 9],
        output=[4, 4, 9],
        temperature=0.0,
        repetition_penalty=1.3,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        logit_bias={20: 2.5},
    )
    expected = logits.tolist()
    expected[20] += 2.5
    for token in (1, 4, 9):
        expected[token] = expected[token] * 1.3 if expected[token] < 0 else expected[token] / 1.3
    for token, count in ((4, 2), (9, 1)):
        expected[token] -= 0.7 + 0.4 * count
    adjusted = logits[None].clone()
    Sampler([EOS]).sample(adjusted, [request])  # changes the logits in place, as documented
    torch.testing.assert_close(adjusted[0], torch.tensor(expected))


@pytest.mark.parametrize(
    ("generated", "ignore_eos", "expected"),
    [(2, False, 30), (3, False, EOS), (2, True, EOS)],
    ids=["masked", "enough tokens", "eos ignored"],
)
def test_min_tokens_masks_stop_ids_until_reached(
    generated: int, ignore_eos: bool, expected: int
) -> None:
    logits = torch.zeros(VOCAB)
    logits[[EOS, 11, 30]] = torch.tensor([9.0, 8.0, 7.0])
    request = make_request(
        output=[1] * generated,
        temperature=0.0,
        min_tokens=3,
        ignore_eos=ignore_eos,
        stop_token_ids=(11,),
    )
    assert sample_one(logits, request).token == expected


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0, 2.0])
@pytest.mark.parametrize("limits", [{}, {"top_p": 0.5}], ids=["plain", "restricted"])
def test_b29_a_bias_or_mask_on_every_token_still_yields_a_token(
    temperature: float, limits: dict[str, Any]
) -> None:
    logits = random_logits(1)[0]
    everything = tuple(range(VOCAB))
    biased = make_request(
        temperature=temperature, logit_bias=dict.fromkeys(everything, -100.0), **limits
    )
    masked = make_request(
        temperature=temperature, min_tokens=5, stop_token_ids=everything, logprobs=1, **limits
    )
    plain = make_request(temperature=temperature, **limits)
    assert sample_one(logits, biased).token == sample_one(logits, plain).token
    sample = sample_one(logits, masked)
    assert sample.token in everything
    assert sample.logprobs is not None
    assert math.isfinite(sample.logprobs.logprob)


def test_only_eos_left_is_sampled() -> None:
    bias = dict.fromkeys((i for i in range(VOCAB) if i != EOS), -1e4)
    assert sample_one(random_logits(1)[0], make_request(logit_bias=bias)).token == EOS
