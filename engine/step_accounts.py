"""What the steps of an engine process have cost and brought, summed since its start."""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.batch import Batch
from engine.messages import ReadBytes, Stats
from engine.read_bytes import count_reads
from engine.step import StepResult

StepKind = Literal["prefill", "decode", "mixed"]

_MEAN_WEIGHT = 0.02  # of the newest decode step in the moving means


def step_kind(batch: Batch) -> StepKind:
    """What a step is made of: new tokens, chunks of prompts or of replayed output, or both."""
    new = sum(span.is_row for span in batch.spans)
    if new == len(batch.spans):
        return "decode"
    return "mixed" if new else "prefill"


class StepAccounts:
    """Sums and moving means over steps; `stats` has them in its fields, all others at 0."""

    def __init__(self, reads: ReadBytes) -> None:
        """`reads`: what a decode step reads per token of context."""
        self.stats = Stats()
        self._reads = reads

    def count_step(self, batch: Batch, result: StepResult, seconds: float, foreseen: float) -> None:
        """Account a step that took `seconds` in the runner; so many were foreseen, or 0."""
        old = self.stats
        kind = step_kind(batch)
        prompt = sum(len(span.tokens) for span in batch.spans if span.rule == "prefill")
        self.stats = msgspec.structs.replace(
            old,
            step=old.step + 1,
            step_seconds=seconds,
            step_seconds_predicted=foreseen,
            prompt_tokens=old.prompt_tokens + prompt,
            layer_attended_fraction=self._means(result),
            **{
                f"{kind}_steps": getattr(old, f"{kind}_steps") + 1,
                f"{kind}_seconds": getattr(old, f"{kind}_seconds") + seconds,
            },
        )
        count_reads(self.stats, self._reads, batch, result)

    def count_token(self) -> None:
        """Account a token that was sampled and is sent."""
        self.stats.generated_tokens += 1

    def count_memory_retry(self) -> None:
        """Account a step that found no memory."""
        self.stats.memory_retries += 1

    def _means(self, result: StepResult) -> dict[int, float]:
        means = dict(self.stats.layer_attended_fraction)
        for layer, fraction in result.layer_attended_fraction.items():
            mean = means.setdefault(layer, fraction)
            means[layer] = mean + _MEAN_WEIGHT * (fraction - mean)
        return means
