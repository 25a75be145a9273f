"""Whether an answer under faults is the answer without them, and what a run has come to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from benchmarks.completion_client import Answer, ChoiceAnswer


def difference(want: Answer, got: Answer, tolerance: float) -> str | None:
    """What is not the same, in one line; None where nothing is.

    Args:
        tolerance: of log-probabilities. Sums in float32 depend on the shape of the batch in their
            last digits; tokens, texts, offsets, reasons and usage must be equal.
    """
    if got.usage != want.usage:
        return f"usage {got.usage}, not {want.usage}"
    for index, (one, other) in enumerate(zip(want.choices, got.choices, strict=True)):
        if other.text != one.text:
            place = _first_difference(one.text, other.text)
            return f"choice {index}: text differs from character {place} of {len(one.text)}"
        if other.finish_reason != one.finish_reason:
            return f"choice {index}: {other.finish_reason}, not {one.finish_reason}"
        problem = _logprobs_differ(one, other, tolerance)
        if problem is not None:
            return f"choice {index}: {problem}"
    return None


def _logprobs_differ(want: ChoiceAnswer, got: ChoiceAnswer, tolerance: float) -> str | None:
    if len(got.logprobs) != len(want.logprobs):
        return f"{len(got.logprobs)} log-probabilities, not {len(want.logprobs)}"
    for place, (one, other) in enumerate(zip(want.logprobs, got.logprobs, strict=True)):
        if (one[0], one[2]) != (other[0], other[2]):
            return f"entry {place} is {other}, not {one}"
        if (one[1] is None) != (other[1] is None):
            return f"entry {place} is {other}, not {one}"
        if one[1] is not None and other[1] is not None and abs(one[1] - other[1]) > tolerance:
            return f"entry {place} is {other}, not {one}"
    return None


def _first_difference(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


@dataclass(slots=True)
class Verdict:
    """Counts requests by what became of them, and keeps what is wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unclean: list[str] = field(default_factory=list)  # what the server held at the end

    @property
    def passed(self) -> bool:
        return not (self.lost or self.wrong or self.unclean)

    def judge(self, name: str, want: Answer, got: Answer, tolerance: float) -> None:
        """Count a finished request."""
        self.counts["finished"] += 1
        self.counts["refusals"] += got.refusals
        problem = difference(want, got, tolerance)
        if problem is not None:
            self.wrong.append(f"request {name}: {problem}")

    def expect(self, what: str, ok: bool) -> None:
        """Note that something is left which should not be."""
        if not ok:
            self.unclean.append(what)
