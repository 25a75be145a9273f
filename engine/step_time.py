"""How long a step will take, learnt from the steps that were measured.

The time of a step is fitted as a sum over what it computes, with factors that are never negative:

    seconds = a tokens + b token pairs + c rows + d context of rows + e [there is a chunk] + f

Rows are new tokens of sequences that decode; tokens are those of chunks, of prompts or of replayed
output; pairs are the (token, earlier token) pairs that heads with full context read for chunks.
What windowed heads read is a constant per token once the window is full, so it is in a. A chunk has
a constant of its own because a step of rows alone may be a recorded one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from engine.batch import Span

_SCALES = (1e3, 1e9, 1e2, 1e6, 1.0, 1.0)  # bring all near 1, so that sweeps converge
_FORGET = 0.97  # weight of a measurement after each newer one of its kind
_REFIT = 8  # measurements after which a fit that nobody asked for is made all the same
_RIDGE = 1e-6  # of each sum of squares: divides what the measurements leave open
_DOUBT = 0.8  # the same where the newer one was clipped: many in a row are a new state of things
_CLIP = 2.0  # a measurement counts as at most so many times what was expected, or its part
_SETTLED = 8  # measurements of a kind before any is clipped; by then there is a fit of them
_GROWTH = 4  # more than so many times the most tokens measured in a step are not foreseen


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step computes, in numbers that its time depends on."""

    rows: int = 0
    row_context: int = 0  # tokens, summed over the rows
    tokens: int = 0
    pairs: float = 0.0

    @classmethod
    def of(cls, spans: Iterable[Span]) -> StepLoad:
        rows = row_context = tokens = 0
        pairs = 0.0
        for span in spans:
            count = len(span.tokens)
            if span.is_row:
                rows += 1
                row_context += span.stop
            else:
                tokens += count
                pairs += _pairs(span.start, count)
        return cls(rows, row_context, tokens, pairs)

    def with_chunk(self) -> StepLoad:
        """The same beside the shortest chunk that there is."""
        return replace(self, tokens=self.tokens + 1)

    def features(self) -> tuple[float, ...]:
        raw = (self.tokens, self.pairs, self.rows, self.row_context, float(self.tokens > 0), 1.0)
        return tuple(value / scale for value, scale in zip(raw, _SCALES, strict=True))


class _Sums:
    """Weighted sums over the measurements of one kind: the normal equations of a fit."""

    def __init__(self, count: int) -> None:
        self.squares = [[0.0] * count for _ in range(count)]
        self.products = [0.0] * count
        self.measured = 0

    def add(self, features: list[float], value: float, kept: float) -> None:
        """Add a measurement; those before keep a share of their weight."""
        self.measured += 1
        for place, left in enumerate(features):
            row = self.squares[place]
            for column, right in enumerate(features):
                row[column] = kept * row[column] + left * right
            self.products[place] = kept * self.products[place] + left * value


class StepTimeModel:
    """Non-negative least squares of relative errors, recent steps first.

    What few measurements leave open is divided between constants and tokens: put on the constants,
    the first guess would be too long; put on the tokens, chunks that are short would stay short.

    Clockless and deterministic. A single step that took far longer than expected, because something
    was compiled or the host was busy, moves the fit little; a lasting change is followed.
    """

    def __init__(self) -> None:
        count = len(_SCALES)
        self._sums = (_Sums(count), _Sums(count))  # of steps without chunks, and with
        self._factors = [0.0] * count
        self._largest = 0  # tokens of chunks in one step
        self._stale = False

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step that took `seconds`; what is not a positive number is left out."""
        if not (0 < seconds < math.inf):
            return
        sums = self._sums[load.tokens > 0]
        expected, unit, measured = self._sum(load), seconds, seconds
        if sums.measured >= _SETTLED and expected > 0:
            seconds = min(max(seconds, expected / _CLIP), expected * _CLIP)
            unit = expected  # else longer steps would count less, and a slowdown be learnt late
        surprise = seconds != measured
        weight = _DOUBT if surprise else _FORGET
        sums.add([value / unit for value in load.features()], seconds / unit, weight)
        self._largest = max(self._largest, load.tokens)
        self._stale = True
        if surprise or sums.measured % _REFIT == 0:
            self._fit()

    def predict(self, load: StepLoad) -> float:
        """Seconds of a step; 0 while nothing was measured. Free for steps without chunks, which
        come at high rates: their factors are those of the last fit."""
        if load.tokens:
            self._fit()
        return self._sum(load)

    def chunk_seconds(self, start: int, count: int) -> float:
        """Seconds that a chunk of `count` tokens from position `start` adds to a step of chunks."""
        per_token, per_pair = self._chunk_factors()
        return per_token * count + per_pair * _pairs(start, count)

    def tokens_within(self, seconds: float, start: int, beside: int = 0) -> int:
        """The longest chunk from position `start` that adds at most `seconds`.

        With the `beside` tokens of other chunks it is not more than a few times the most that was
        measured in a step: further the fit is not trusted.
        """
        per_token, per_pair = self._chunk_factors()
        most = _GROWTH * self._largest - beside
        if seconds <= 0 or most <= 0:
            return 0
        linear = per_token + per_pair * (start + 0.5)
        root = linear + math.sqrt(linear * linear + 2 * per_pair * seconds)
        return most if root * most <= 2 * seconds else int(2 * seconds / root)

    def _sum(self, load: StepLoad) -> float:
        return sum(f * x for f, x in zip(self._factors, load.features(), strict=True))

    def _chunk_factors(self) -> tuple[float, float]:
        self._fit()
        return self._factors[0] / _SCALES[0], self._factors[1] / _SCALES[1]

    def _fit(self) -> None:
        """Solve the normal equations; while a factor is negative, the worst one becomes 0."""
        if not self._stale:
            return
        self._stale = False
        rows_only, chunks = self._sums
        squares = [
            [left + right for left, right in zip(*pair, strict=True)]
            for pair in zip(rows_only.squares, chunks.squares, strict=True)
        ]
        products = [a + b for a, b in zip(rows_only.products, chunks.products, strict=True)]
        norms = [math.sqrt(row[i]) for i, row in enumerate(squares)]
        places = [i for i, norm in enumerate(norms) if norm > 0]
        while places:
            matrix = [
                [squares[i][k] / norms[i] / norms[k] + _RIDGE * (i == k) for k in places]
                for i in places
            ]
            scaled = _solve(matrix, [products[i] / norms[i] for i in places])
            lowest = min(scaled)
            if lowest >= 0:
                for place, value in zip(places, scaled, strict=True):
                    self._factors[place] = value / norms[place]
                return
            self._factors[places.pop(scaled.index(lowest))] = 0.0


def _solve(matrix: list[list[float]], values: list[float]) -> list[float]:
    """The x of matrix x = values, of a positive definite matrix; both are overwritten."""
    count = len(values)
    for place in range(count):
        pivot = matrix[place]
        for below in range(place + 1, count):
            ratio = matrix[below][place] / pivot[place]
            row = matrix[below]
            for column in range(place, count):
                row[column] -= ratio * pivot[column]
            values[below] -= ratio * values[place]
    for place in reversed(range(count)):
        known = sum(matrix[place][k] * values[k] for k in range(place + 1, count))
        values[place] = (values[place] - known) / matrix[place][place]
    return values


def _pairs(start: int, count: int) -> float:
    """Sum of the context lengths of `count` tokens from position `start`."""
    return count * (start + (count + 1) / 2)
