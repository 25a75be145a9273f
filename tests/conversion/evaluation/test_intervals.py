"""Intervals against published and hand-computed values."""

from __future__ import annotations

import math
import random

import pytest

from conversion.evaluation.intervals import (
    Interval,
    average,
    design_effect,
    mean_score,
    paired_difference,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_the_published_interval(right: int, count: int, low: float, high: float) -> None:
    found = wilson(right / count, count)
    assert found.value == right / count
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


def test_independent_scores_have_no_design_effect() -> None:
    scores = [(1.0,)] * 81 + [(0.0,)] * 182
    assert design_effect(scores) == pytest.approx(263 / 262)
    assert mean_score(scores).low == pytest.approx(0.2553, abs=2e-4)


def test_documents_that_agree_with_themselves_count_once() -> None:
    """Ten equal answers in each of twenty documents say hardly more than twenty answers."""
    scores = [(1.0,) * 10] * 10 + [(0.0,) * 10] * 10
    assert design_effect(scores) == pytest.approx(10 * 20 / 19)
    ours, single = mean_score(scores), wilson(0.5, 20)
    assert ours.high - ours.low == pytest.approx(single.high - single.low, rel=0.03)


def test_perfect_scores_keep_a_width() -> None:
    found = mean_score([(1.0, 1.0)] * 50)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(100 / (100 + 1.96**2), abs=1e-4)


def test_a_paired_difference_by_hand() -> None:
    """Bonett and Price: (b + 1 - c - 1) / (n + 2) with 6 gains, 2 losses, 40 pairs."""
    ours = [(1.0,)] * 30 + [(1.0,)] * 6 + [(0.0,)] * 4
    reference = [(1.0,)] * 30 + [(0.0,)] * 6 + [(1.0,)] * 2 + [(0.0,)] * 2
    count = 40 / design_effect([(a[0] - b[0],) for a, b in zip(ours, reference, strict=True)])
    gain, loss = (6 / 40 * count + 1) / (count + 2), (2 / 40 * count + 1) / (count + 2)
    half = 1.959964 * math.sqrt((gain + loss - (gain - loss) ** 2) / (count + 2))

    found = paired_difference(ours, reference)

    assert found.value == pytest.approx(4 / 40)
    assert count == pytest.approx(39)
    assert found.low == pytest.approx(gain - loss - half, abs=1e-6)
    assert found.high == pytest.approx(gain - loss + half, abs=1e-6)


def test_equal_scores_differ_by_nothing_but_not_for_sure() -> None:
    scores = [(1.0, 0.0)] * 100
    found = paired_difference(scores, scores)
    assert found.value == 0.0
    assert found.high == pytest.approx(-found.low)
    assert found.high == pytest.approx(1.96 * math.sqrt(2 / 202 / 202), abs=1e-4)


def test_the_paired_interval_covers_the_truth() -> None:
    """2000 experiments of 200 pairs with a true difference of -0.04: about 95 % cover it."""
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        ours, reference = [], []
        for _ in range(200):
            kind = rng.random()
            ours.append((float(kind >= 0.06),))
            reference.append((float(kind < 0.06 or kind >= 0.08),))
        found = paired_difference(ours, reference)
        covered += found.low <= -0.04 <= found.high
    assert 0.93 < covered / 2000 < 0.985


def test_an_average_adds_half_widths_as_squares() -> None:
    found = average([Interval(0.9, 0.6, 1.0), Interval(0.5, 0.1, 0.7)])
    assert found.value == pytest.approx(0.7)
    assert found.low == pytest.approx(0.7 - 0.5 / 2)
    assert found.high == pytest.approx(0.7 + math.hypot(0.1, 0.2) / 2)
