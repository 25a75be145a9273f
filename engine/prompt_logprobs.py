"""Log-probabilities of prompt tokens (echo with logprobs), a few rows of logits at a time.

Legend: T tokens of the span, E hidden size, R rows of logits at once, V logits width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from engine.batch import Span
from engine.messages import TokenLogprobs
from engine.queued_step import QueuedStep
from engine.request import Request
from engine.sampler import top_logprobs
from engine.step import PromptLogprobs

Logits = Callable[[torch.Tensor], torch.Tensor]  # [R, E] to [R, V]
_MAX_LOGITS = 1 << 23  # elements computed at once: 32 MiB in float32


def step_prompt_logprobs(
    step: QueuedStep, failed: Collection[int], logits: Logits, vocab_size: int
) -> dict[int, PromptLogprobs]:
    """By request id, of the spans of a step that ask for them and have not failed."""
    result: dict[int, PromptLogprobs] = {}
    if step.hidden_TE is None:
        return result
    rows = step.batch.rows()
    for span, request, (start, stop) in zip(step.batch.spans, step.owners, rows, strict=True):
        asked = span.rule == "prefill" and request.params.prompt_logprobs is not None
        if asked and span.request_id not in failed:
            hidden = step.hidden_TE[start:stop]
            result[span.request_id] = prompt_logprobs(span, request, hidden, logits, vocab_size)
    return result


def prompt_logprobs(
    span: Span,
    request: Request,
    hidden_TE: torch.Tensor,
    logits: Logits,
    vocab_size: int,
) -> PromptLogprobs:
    """Entries for the prompt positions that this span's hidden states predict.

    The state at position m predicts the token at m + 1, so a span over [start, stop) yields
    [start + 1, stop + 1), less what lies past the prompt. Position 0 is predicted by nothing: its
    entry is None and comes with the first span.
    """
    count = request.params.prompt_logprobs
    assert count is not None
    targets = request.prompt[span.start + 1 : span.stop + 1]
    rows = max(_MAX_LOGITS // vocab_size, 1)
    entries: list[TokenLogprobs | None] = [] if span.start else [None]
    for first in range(0, len(targets), rows):
        chunk = targets[first : first + rows]
        logprobs_RV = logits(hidden_TE[first : first + len(chunk)]).log_softmax(dim=-1)
        entries += [
            top_logprobs(row_V, token, count)
            for row_V, token in zip(logprobs_RV, chunk, strict=True)
        ]
    return (span.start + 1 if span.start else 0), entries
