"""Items made ahead: in order, not all at once, and with the errors of their making."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import pytest

from conversion.side_by_side import AHEAD, ahead, side_by_side


def test_what_is_made_ahead_comes_in_order_and_whole() -> None:
    for length in (0, 1, AHEAD, 3 * AHEAD + 1):
        assert list(ahead(lambda n: n * n, range(length))) == [n * n for n in range(length)]
    assert side_by_side(lambda n: n * n, range(40)) == [n * n for n in range(40)]


def test_items_without_end_are_taken_as_far_as_needed() -> None:
    taken: list[int] = []

    def noted() -> Iterator[int]:
        for item in count():
            taken.append(item)
            yield item

    found = list(islice(ahead(str, noted()), 3))
    assert found == ["0", "1", "2"]
    assert len(taken) == AHEAD + 3


def test_an_item_that_fails_fails_in_its_turn() -> None:
    made = ahead(lambda n: 6 // (2 - n), range(5))
    assert [next(made), next(made)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(made)
