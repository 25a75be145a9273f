"""Intervals against published and hand-computed values."""

from __future__ import annotations

import math
import random

import pytest

from conversion.evaluation.intervals import (
    ScoresByDocument,
    Stratum,
    average_difference,
    average_score,
    mean_score,
    paired_difference,
    wilson,
)
from conversion.evaluation.intervals import design_effect as effect_of_strata


def design_effect(scores: ScoresByDocument) -> float:
    return effect_of_strata([Stratum(1.0, scores)])


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


def test_documents_without_a_question_say_nothing() -> None:
    scores = [(1.0,), (0.0, 1.0)] * 9
    assert mean_score([*scores, (), ()]) == mean_score(scores)


def test_a_stratum_in_halves_is_the_stratum() -> None:
    """The same differences under two settings of equal weight; so are their intervals."""
    rng = random.Random(1)
    whole = [tuple(float(rng.choice((-1, 0, 0, 0, 1))) for _ in range(6)) for _ in range(40)]
    first, second = [own[:3] for own in whole], [own[3:] for own in whole]
    halves = average_difference([Stratum(0.5, first), Stratum(0.5, second)])
    once = average_difference([Stratum(1.0, whole)])
    assert halves.value == pytest.approx(once.value)
    # Strata take away what differs between them, which here is next to nothing.
    assert halves.low == pytest.approx(once.low, rel=0.02)
    assert halves.high == pytest.approx(once.high, rel=0.02)


def test_a_task_that_always_differs_and_one_that_never_does_vary_little() -> None:
    """Between strata there is no variance: only the one pair added to each side is left."""
    lost, kept = [(-1.0,)] * 100, [(0.0,)] * 100
    found = average_difference([Stratum(0.5, lost), Stratum(0.5, kept)])
    assert found.value == -0.5
    # changed: 0.5^2 / 100, drift the same; 200 questions in all.
    shrunk = 200 / 202
    half = 1.959964 * math.sqrt(0.0025 * (shrunk**2 - shrunk**3) + 2 / 202**2)
    assert found.low == pytest.approx(-0.5 * shrunk - half, abs=1e-6)
    assert found.high == pytest.approx(-0.5 * shrunk + half, abs=1e-6)


def test_equal_tasks_on_the_same_documents_say_no_more_than_one() -> None:
    rng = random.Random(2)
    scores = [(float(rng.random() < 0.8),) for _ in range(300)]
    one = average_score([Stratum(1.0, scores)])
    same = average_score([Stratum(0.25, scores)] * 4)
    shuffled = [Stratum(0.25, rng.sample(scores, len(scores))) for _ in range(4)]
    other = average_score(shuffled)
    assert same.high - same.low == pytest.approx(one.high - one.low, rel=1e-3)
    assert other.high - other.low == pytest.approx((one.high - one.low) / 2, rel=0.15)


def test_an_average_over_one_stratum_is_its_own_interval() -> None:
    ours = [(1.0, 0.0), (0.5, 1.0), (0.0, 0.0)] * 10
    reference = [(1.0, 1.0), (0.0, 1.0), (0.0, 1.0)] * 10
    found = paired_difference(ours, reference)
    assert found.value == pytest.approx(-0.25)
    assert found.low < found.value < found.high
    assert mean_score(ours) == average_score([Stratum(1.0, ours)])


def test_the_average_of_paired_differences_covers_the_truth() -> None:
    """1000 experiments: three tasks of 5 questions on the same 40 documents, one in ten of which
    loses half of its answers whatever the task. The truth is -0.05; without the documents as
    clusters the interval would cover it in half of them."""
    rng = random.Random(3)
    covered = 0
    for _ in range(1000):
        hard = [rng.random() < 0.1 for _ in range(40)]
        strata = [
            Stratum(
                1 / 3,
                [tuple(-float(bad and rng.random() < 0.5) for _ in range(5)) for bad in hard],
            )
            for _ in range(3)
        ]
        found = average_difference(strata)
        covered += found.low <= -0.05 <= found.high
    assert 0.9 < covered / 1000 < 0.99
