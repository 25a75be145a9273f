"""95 % confidence intervals for scores, and for differences on the same samples.

Scores of one document share their text, so they say less than as many independent ones: counts are
divided by the design effect (Kish), measured over the documents, before an interval is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054
ScoresByDocument = Sequence[Sequence[float]]
"""Scores from 0 to 1, as many per document as it has questions."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


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
    flat = [score for document in scores for score in document]
    mean = sum(flat) / len(flat)
    return wilson(mean, len(flat) / design_effect(scores))


def paired_difference(ours: ScoresByDocument, reference: ScoresByDocument) -> Interval:
    """Mean of ours - reference over the same questions.

    The adjusted Wald interval for paired proportions (Bonett and Price 2012): one pair is added to
    the gains and one to the losses, so that it keeps its width where no score differs. Parts of a
    score count as parts of a gain or a loss.
    """
    differences = [
        [a - b for a, b in zip(left, right, strict=True)]
        for left, right in zip(ours, reference, strict=True)
    ]
    flat = [value for document in differences for value in document]
    mean = sum(flat) / len(flat)
    count = len(flat) / design_effect(differences)
    gains = sum(max(value, 0.0) for value in flat) / len(flat) * count
    losses = sum(max(-value, 0.0) for value in flat) / len(flat) * count
    gain, loss = (gains + 1) / (count + 2), (losses + 1) / (count + 2)
    half = Z95 * math.sqrt((gain + loss - (gain - loss) ** 2) / (count + 2))
    return Interval(mean, max(-1.0, gain - loss - half), min(1.0, gain - loss + half))


def design_effect(scores: ScoresByDocument) -> float:
    """Variance of the mean over documents by that of as many independent scores; at least 1."""
    flat = [score for document in scores for score in document]
    documents, count = len(scores), len(flat)
    mean = sum(flat) / count
    independent = sum((score - mean) ** 2 for score in flat) / count**2
    if documents < 2 or independent == 0.0:
        return 1.0
    residuals = [sum(document) - mean * len(document) for document in scores]
    clustered = sum(r * r for r in residuals) / count**2 * documents / (documents - 1)
    return max(1.0, clustered / independent)


def average(parts: Sequence[Interval]) -> Interval:
    """Plain mean of independent estimates; half widths add as squares, each side by itself."""
    count = len(parts)
    value = sum(part.value for part in parts) / count
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / count
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / count
    return Interval(value, value - below, value + above)
