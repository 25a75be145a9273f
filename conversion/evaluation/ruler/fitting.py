"""How much haystack fits: RULER's search, in its order of random draws.

Every probe of the search draws from the task's generator like a sample does, so samples equal
RULER's own only if the same sizes are probed in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from conversion.errors import ConversionError

SEED = 42
SHORT_LENGTH = 4096  # below it RULER takes smaller steps and easier word counts


@dataclass(frozen=True, slots=True)
class Draft:
    """One sample before its fit is known."""

    prompt: str
    references: tuple[str, ...]


def largest_size(
    make: Callable[[int], Draft], fits: Callable[[str], bool], low: int, high: int
) -> int:
    """The largest size from `low` to `high` whose prompt fits, by bisection; `low` if none does."""
    best = low
    while low <= high:
        middle = (low + high) // 2
        if fits(make(middle).prompt):
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


def fitting_draft(
    make: Callable[[int], Draft], fits: Callable[[str], bool], size: int, step: int, task: str
) -> Draft:
    """A draft of `size`, drawn again `step` smaller as long as it does not fit.

    Raises:
        ConversionError: the length is too short for this task.
    """
    while True:
        draft = make(size)
        if fits(draft.prompt):
            return draft
        if size <= step:
            raise ConversionError(f"{task}: the length is too short for one sample of it")
        size -= step
