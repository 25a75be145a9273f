"""The rule by which a soak run calls a series flat."""

from __future__ import annotations

import random

import pytest

from benchmarks.trend import _student_95, fit_trend

MINUTES = [float(minute) for minute in range(28)]


def test_noise_is_flat_and_a_leak_is_not() -> None:
    rng = random.Random(1)
    noise = [100 + rng.gauss(0, 5) for _ in MINUTES]
    assert fit_trend(MINUTES, noise, 0.02).flat
    leak = [value + 1.0 * minute for value, minute in zip(noise, MINUTES, strict=True)]
    trend = fit_trend(MINUTES, leak, 0.02)
    assert not trend.flat
    assert 0.15 < trend.growth < 0.35
    assert trend.growth_low < trend.growth < trend.growth_high


def test_growth_below_the_allowed_share_is_flat_even_if_it_is_certain() -> None:
    slow = [100 + 0.01 * minute for minute in MINUTES]
    assert fit_trend(MINUTES, slow, 0.02).flat
    assert not fit_trend(MINUTES, slow, 0.001).flat


def test_what_falls_or_stands_still_is_flat() -> None:
    assert fit_trend(MINUTES, [200 - minute for minute in MINUTES], 0.0).flat
    still = fit_trend(MINUTES, [12.0] * 28, 0.0)
    assert still.flat
    assert still.growth == 0


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (3, 3.182), (10, 2.228), (26, 2.056)]
)
def test_quantiles_of_students_t(freedom: int, quantile: float) -> None:
    """Compared with the printed tables."""
    assert _student_95(freedom) == pytest.approx(quantile, rel=0.01)


def test_two_values_have_no_trend() -> None:
    with pytest.raises(ValueError, match="2 values have no trend"):
        fit_trend([0, 1], [1, 2], 0.1)
