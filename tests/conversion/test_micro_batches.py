"""Every sequence once, batches of one shape, processes in step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conversion.micro_batches import Shape, micro_batches

SHAPES = [Shape(10, 3), Shape(10, 4), Shape(25, 3), Shape(60, 9)]


@given(
    chosen=st.lists(st.sampled_from(SHAPES), min_size=4, max_size=30),
    world=st.integers(1, 4),
    micro_tokens=st.integers(1, 80),
)
def test_batches(chosen: list[Shape], world: int, micro_tokens: int) -> None:
    numbers = list(range(100, 100 + len(chosen)))
    shapes = dict(zip(numbers, chosen, strict=True))

    of_ranks = [micro_batches(numbers, shapes, r, world, micro_tokens) for r in range(world)]

    every = [batch for batches in of_ranks for batch in batches]
    counted = [number for batch in every if batch.counts for number in batch.numbers]
    assert sorted(counted) == numbers
    assert len({len(batches) for batches in of_ranks}) == 1
    assert any(all(batch.counts for batch in batches) for batches in of_ranks)
    for batch in every:
        assert {shapes[number] for number in batch.numbers} == {batch.shape}
        assert len(batch.numbers) == 1 or len(batch.numbers) * batch.shape.tokens <= micro_tokens
