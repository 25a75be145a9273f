"""Which sequences a process computes together. Torch-free.

Sequences of one shape make one batch, so nothing is padded. All processes get as many batches, as
each must take part whenever sharded weights are gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


class Shape(NamedTuple):
    """Tokens of a sequence, and how many of them at its end are response."""

    tokens: int
    response: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences of one shape. One that does not count only keeps a process in step."""

    numbers: tuple[int, ...]
    shape: Shape
    counts: bool = True


def micro_batches(
    numbers: Sequence[int], shapes: Mapping[int, Shape], rank: int, world: int, micro_tokens: int
) -> list[MicroBatch]:
    """The batches of one process; together all processes compute every number once.

    Args:
        numbers: sequences, at least one per process.
        micro_tokens: at most so many tokens in a batch, but at least one sequence.
    """
    assert len(numbers) >= world
    of_ranks = [_grouped(numbers[r::world], shapes, micro_tokens) for r in range(world)]
    most = max(map(len, of_ranks))
    own = of_ranks[rank]
    filler = replace(own[0], counts=False)
    return own + [filler] * (most - len(own))


def _grouped(
    numbers: Sequence[int], shapes: Mapping[int, Shape], micro_tokens: int
) -> list[MicroBatch]:
    by_shape: dict[Shape, list[int]] = {}
    for number in numbers:
        by_shape.setdefault(shapes[number], []).append(number)
    batches = []
    for shape, members in by_shape.items():
        size = max(1, micro_tokens // shape.tokens)
        parts = (members[i : i + size] for i in range(0, len(members), size))
        batches += [MicroBatch(tuple(part), shape) for part in parts]
    return batches
