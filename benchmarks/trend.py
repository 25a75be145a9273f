"""Whether a series of measurements grows: its slope, how sure that is, and a stated rule.

A straight line is fitted by least squares; its slope has a 95 % interval (Student's t). A series is
flat unless even the lower end of the interval means that it grew, over the time measured, by more
than an allowed share of its mean. So noise alone hardly ever fails it, and a small steady leak does
as soon as the run is long enough to be sure of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trend:
    """One series. Growth is over the whole time measured, as a share of the mean."""

    mean: float
    growth: float
    growth_low: float  # of the 95 % interval
    growth_high: float
    allowed: float

    @property
    def flat(self) -> bool:
        return self.growth_low <= self.allowed


def fit_trend(times: Sequence[float], values: Sequence[float], allowed: float) -> Trend:
    """The trend of `values` at `times`, at least three of them; `allowed` is a share of the mean.

    Raises:
        ValueError: too few values, or all at one time.
    """
    count = len(values)
    if count < 3 or len(set(times)) < 2:
        raise ValueError(f"{count} values have no trend")
    slope, intercept = statistics.linear_regression(times, values)
    residuals = [v - (intercept + slope * t) for t, v in zip(times, values, strict=True)]
    middle = statistics.fmean(times)
    spread = sum((t - middle) ** 2 for t in times)
    error = math.sqrt(sum(r * r for r in residuals) / (count - 2) / spread)
    margin = _student_95(count - 2) * error
    mean = statistics.fmean(values)
    share = (max(times) - min(times)) / mean if mean else 0.0
    return Trend(
        mean=mean,
        growth=slope * share,
        growth_low=(slope - margin) * share,
        growth_high=(slope + margin) * share,
        allowed=allowed,
    )


def _student_95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t, to 1 % from 3 degrees of freedom on.

    Series of Cornish and Fisher around the normal quantile z (Abramowitz and Stegun, 26.7.5).
    """
    exact = {1: 12.706, 2: 4.303}
    if freedom in exact:
        return exact[freedom]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
