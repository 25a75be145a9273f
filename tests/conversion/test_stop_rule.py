"""When training stops, on made-up validation curves."""

from __future__ import annotations

import math

import pytest

from conversion.stop_rule import Gap, StopRule, best

RULE = StopRule(patience=3, growth=0.25, settled_after=100)


def curve(*gaps: float) -> list[Gap]:
    return [Gap(50 * place, kl, 0.9) for place, kl in enumerate(gaps)]


def stopped_at(*gaps: float) -> tuple[int, str] | None:
    """The first validation that stops, and why."""
    for count in range(1, len(gaps) + 1):
        if reason := RULE.reason(curve(*gaps[:count])):
            return count - 1, reason
    return None


def test_a_gap_that_shrinks_goes_on() -> None:
    assert stopped_at(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4) is None


def test_a_gap_that_stays_stops_after_patience() -> None:
    found = stopped_at(1.0, 0.8, 0.5, 0.4, 0.4, 0.41, 0.4, 0.2)
    assert found is not None
    assert found[0] == 6
    assert "no longer shrinks" in found[1]
    assert "0.400000 at step 150" in found[1]


def test_a_gain_too_small_to_matter_is_none() -> None:
    found = stopped_at(1.0, 0.8, 0.5, 0.4, 0.3999, 0.3998, 0.3997)
    assert found is not None
    assert found[0] == 6


def test_small_gains_that_add_up_are_one() -> None:
    assert stopped_at(1.0, 0.8, 0.5, 0.4, 0.3985, 0.3975, 0.3965, 0.396) is None


def test_validations_of_the_warm_up_do_not_count() -> None:
    assert stopped_at(0.5, 0.5, 0.5, 0.5, 0.5) is None
    found = stopped_at(0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
    assert found is not None
    assert found[0] == 5


@pytest.mark.parametrize("place", [1, 3])
def test_a_gap_that_grows_stops_at_once(place: int) -> None:
    gaps = [1.0, 0.9, 0.8, 0.7]
    gaps[place] = gaps[place - 1] * 1.3
    found = stopped_at(*gaps)
    assert found is not None
    assert found[0] == place
    assert "grows" in found[1]


def test_a_gap_that_is_not_a_number_stops_and_is_never_the_best() -> None:
    found = stopped_at(1.0, math.nan, math.nan)
    assert found is not None
    assert found[0] == 1
    assert best(curve(math.nan, 0.5, math.nan)).step == 50
