"""A step that is queued on the device: what will be read of it, and where it will lie.

Legend: T tokens of the batch, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.batch import Batch
from engine.request import Request
from engine.sampler import PendingSamples
from engine.step import Sample, StepResult
from engine.token_budget import PendingBudget
from engine.transfer import Readback


@dataclass(frozen=True, slots=True)
class QueuedStep:
    """Its results are places in one `Readback`, so that the host waits once."""

    batch: Batch
    readback: Readback
    finite: int  # place of a flag for each span: all its hidden states are finite
    samples: PendingSamples | None
    budget: PendingBudget | None
    owners: Sequence[Request] = ()  # of the spans, and
    hidden_TE: Tensor | None = None  # of steps that may hold prompt tokens

    def read(self) -> StepResult:
        """Wait for the device; all of the result but for log-probabilities of prompts.

        Failed are requests with a hidden state or logits that are not finite; also those that do
        not sample yet, because their pages would go into the prefix cache.
        """
        values = self.readback.fetch()  # the one point at which a step waits for the device
        flags = zip(self.batch.spans, values[self.finite], strict=False)  # padded rows follow
        failed = {span.request_id for span, is_finite in flags if not is_finite}
        samples = self._read_samples(values)
        failed |= {request_id for request_id, sample in samples.items() if sample.token is None}
        attended, layer_fraction = self.budget.read(values) if self.budget else ({}, {})
        return StepResult(
            samples=samples,
            failed=failed,
            attended=attended,
            layer_attended_fraction=layer_fraction,
        )

    def _read_samples(self, values: Sequence[Sequence[float]]) -> dict[int, Sample]:
        """By request id."""
        if self.samples is None:
            return {}
        ids = (request.request_id for request in self.samples.requests)
        return dict(zip(ids, self.samples.read(values), strict=True))


@dataclass(frozen=True, slots=True)
class StartedStep:
    """Implements `engine.step.PendingStep` with the runner that started the step."""

    step: QueuedStep
    read: Callable[[QueuedStep], StepResult]

    def finish(self) -> StepResult:
        return self.read(self.step)
