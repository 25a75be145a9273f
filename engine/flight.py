"""A step between its start and the reading of its results (why there may be two: `look_ahead`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.batch import Batch
from engine.step import PendingStep
from engine.step_note import StepNote
from engine.tracker import RequestTracker


@dataclass(slots=True)
class Flight:
    """One step. Times are monotonic seconds."""

    batch: Batch
    pending: PendingStep
    foreseen: float  # seconds that it will take; 0: nothing is known
    began: float  # when it was started or, if that was later, when the step before it was read
    ended: set[int] = field(default_factory=set)  # requests that ended since it was started

    def holds(self, request_id: int) -> bool:
        return any(span.request_id == request_id for span in self.batch.spans)


def note_of(batch: Batch, began: float) -> StepNote:
    """What the front end is to know while the step is under way."""
    return StepNote(began, batch.num_tokens, batch.request_ids)


def leaving(batch: Batch, trackers: Mapping[int, RequestTracker]) -> set[int] | None:
    """Requests that end with a step by their length; None if nothing can be foreseen of some.

    Args:
        trackers: of all requests of the batch, by id.
    """
    found = set()
    for span in batch.spans:
        tracker = trackers[span.request_id]
        if not (span.is_row and span.sample) or tracker.request.params.penalises:
            return None
        if tracker.ends_at(span.stop + 1):
            found.add(span.request_id)
    return found
