"""95 % confidence intervals for scores, and for differences on the same samples.

Questions of one document share its text, so they say less than as many independent ones, and tasks
that plant their facts into the same texts share those: document i of one task is document i of the
others. Counts are divided by the design effect (Kish), measured over documents, before an interval
is taken. The formulas keep a width where every score is the same, which a bootstrap does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

Z95 = 1.959963984540054
ScoresByDocument = Sequence[Sequence[float]]
"""Scores from 0 to 1, as many per document as it has questions; () if it has none."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Stratum:
    """Scores of one task and setting, or differences of scores, and their weight in an average."""

    weight: float
    scores: ScoresByDocument

    @property
    def count(self) -> int:
        """Questions."""
        return sum(map(len, self.scores))

    @property
    def mean(self) -> float:
        return sum(map(sum, self.scores)) / self.count

    @property
    def variance(self) -> float:
        """Of the mean, if its scores were independent."""
        mean = self.mean
        return sum((s - mean) ** 2 for own in self.scores for s in own) / self.count**2

    def residuals(self) -> list[float]:
        """What each document adds to the mean, beyond its share of it."""
        mean, count = self.mean, self.count
        return [(sum(own) - mean * len(own)) / count for own in self.scores]


def wilson(share: float, count: float) -> Interval:
    """Wilson's score interval of a proportion measured `count` times (Wilson 1927)."""
    assert count > 0
    z2 = Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    half = Z95 * spread / (1 + z2 / count)
    # At 0 and 1 rounding may put the bound a hair on the wrong side of the estimate.
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Interval(share, min(low, share), max(high, share))


def mean_score(scores: ScoresByDocument) -> Interval:
    """Mean of all scores, Wilson's interval at the effective count."""
    return average_score([Stratum(1.0, scores)])


def average_score(strata: Sequence[Stratum]) -> Interval:
    """Weighted mean of the strata's means, Wilson's interval at the effective count."""
    mean = sum(stratum.weight * stratum.mean for stratum in strata)
    return wilson(min(max(mean, 0.0), 1.0), _effective_count(strata))


def paired_difference(ours: ScoresByDocument, reference: ScoresByDocument) -> Interval:
    """Mean of ours - reference over the same questions, interval as `average_difference`."""
    return average_difference([Stratum(1.0, differences(ours, reference))])


def differences(ours: ScoresByDocument, reference: ScoresByDocument) -> list[list[float]]:
    """ours - reference, question by question."""
    return [
        [a - b for a, b in zip(left, right, strict=True)]
        for left, right in zip(ours, reference, strict=True)
    ]


def average_difference(strata: Sequence[Stratum]) -> Interval:
    """Weighted mean of differences on the same questions.

    The adjusted Wald interval for paired proportions (Bonett and Price 2012): one pair is added to
    the gains and one to the losses, so that it keeps its width where no score differs. Parts of a
    score count as parts of a gain or a loss. Over several strata, whose variances add up by the
    squares of their weights, it is one pair for all of them together; one stratum gives the
    published formula.
    """
    mean = sum(stratum.weight * stratum.mean for stratum in strata)
    effect, count = design_effect(strata), _effective_count(strata)
    changed = drift = 0.0  # (gain + loss) and (gain - loss)^2 of Bonett and Price, over the count
    for stratum in strata:
        share = effect * stratum.weight**2 / stratum.count
        changed += share * sum(abs(d) for own in stratum.scores for d in own) / stratum.count
        drift += share * stratum.mean**2
    kept = count / (count + 2)
    half = Z95 * math.sqrt(kept**2 * changed - kept**3 * drift + 2 / (count + 2) ** 2)
    return Interval(mean, max(-1.0, kept * mean - half), min(1.0, kept * mean + half))


def design_effect(strata: Sequence[Stratum]) -> float:
    """Variance of the average over documents by that of as many independent scores; at least 1.

    Document i of one stratum goes with document i of the others.
    """
    independent = sum(stratum.weight**2 * stratum.variance for stratum in strata)
    documents = max(sum(map(bool, stratum.scores)) for stratum in strata)
    if documents < 2 or independent == 0.0:
        return 1.0
    weighted = [[stratum.weight * r for r in stratum.residuals()] for stratum in strata]
    by_document = [sum(own) for own in zip_longest(*weighted, fillvalue=0.0)]
    clustered = sum(r * r for r in by_document) * documents / (documents - 1)
    return max(1.0, clustered / independent)


def _effective_count(strata: Sequence[Stratum]) -> float:
    """How many independent questions of equal weight would say as much."""
    shares = sum(stratum.weight**2 / stratum.count for stratum in strata)
    return 1 / (design_effect(strata) * shares)
