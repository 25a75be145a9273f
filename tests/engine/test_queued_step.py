"""What is read of a step when the device is done with it."""

from __future__ import annotations

import torch

from engine.batch import Batch, Span
from engine.queued_step import QueuedStep
from engine.request import Request, SamplingParams
from engine.sampler import PendingSamples
from engine.transfer import Readback


def span(request_id: int, sample: bool = True) -> Span:
    return Span(request_id, 0, 0, [1, 2], "prefill", [1], [1], sample)


def test_values_that_are_not_finite_fail_their_request_alone_sampled_or_not() -> None:
    """Hidden states of a padded row behind the spans belong to nobody."""
    readback = Readback()
    finite = readback.add(torch.tensor([True, False, True, False]))
    step = QueuedStep(
        Batch([span(7), span(8, sample=False), span(9)]), readback, finite, None, None
    )
    result = step.read()
    assert result.failed == {8}
    assert (result.samples, result.attended) == ({}, {})


def test_logits_that_are_not_finite_fail_their_request() -> None:
    readback = Readback()
    requests = [Request(i, [1, 2], SamplingParams(temperature=0.0)) for i in (7, 9)]
    tokens = readback.add(torch.tensor([4, 5]))
    finite_logits = readback.add(torch.tensor([True, False]))
    finite = readback.add(torch.tensor([True, True]))
    samples = PendingSamples(requests, tokens, finite_logits)
    result = QueuedStep(Batch([span(7), span(9)]), readback, finite, samples, None).read()
    assert {i: sample.token for i, sample in result.samples.items()} == {7: 4, 9: None}
    assert result.failed == {9}
