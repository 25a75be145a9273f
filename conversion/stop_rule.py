"""When training has nothing more to give: a rule on the validation gap. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_GAIN = 0.005  # a gap smaller by less than this share is not smaller


@dataclass(frozen=True, slots=True)
class Gap:
    """How far the student is from the teacher on held-out sequences, after `step` steps."""

    step: int
    kl: float  # nats per response token, over the teacher's most likely tokens
    agreement: float  # share of response tokens whose best guess is the teacher's


@dataclass(frozen=True, slots=True)
class StopRule:
    """Stop when the gap no longer shrinks, or grows.

    patience: validations in a row without a gain; those before `settled_after` steps do not count,
        as the learning rate is still rising.
    growth: share above the smallest gap.
    """

    patience: int
    growth: float
    settled_after: int = 0

    def reason(self, curve: Sequence[Gap]) -> str | None:
        """Why to stop after the last of these validations; None: go on."""
        smallest = best(curve)
        last = curve[-1]
        where = f"{smallest.kl:.6f} at step {smallest.step}"
        if not last.kl <= smallest.kl * (1 + self.growth):  # or it is not a number
            return f"the gap grows: {last.kl:.6f} at step {last.step}, smallest {where}"
        gain_step = max(last_gain(curve).step, self.settled_after)
        waited = sum(gap.step > gain_step for gap in curve)
        if waited >= self.patience:
            return f"the gap no longer shrinks: smallest {where}, {waited} validations without gain"
        return None


def best(curve: Sequence[Gap]) -> Gap:
    """The first of the smallest gaps; one that is not a number is never the smallest."""
    return min(curve, key=lambda gap: math.inf if math.isnan(gap.kl) else gap.kl)


def last_gain(curve: Sequence[Gap]) -> Gap:
    """The last validation whose gap was smaller than all before it by LEAST_GAIN."""
    gained = curve[0]
    for gap in curve[1:]:
        if gap.kl < gained.kl * (1 - LEAST_GAIN):
            gained = gap
    return gained
