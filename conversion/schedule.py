"""Learning-rate schedules: factors on the peak rate by step. Torch-free."""

from __future__ import annotations

import math


def warmup_constant(step: int, warmup: int) -> float:
    """Factor of step 0, 1, ...: a linear rise over `warmup` steps, then 1."""
    return min(1.0, (step + 1) / max(1, warmup))


def cooldown(step: int, steps: int, falling: int) -> float:
    """Factor of step 0 .. steps - 1: 1, then a fall in a line to 0 after the last step."""
    return min(1.0, (steps - step) / max(1, falling))


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of step 0 .. steps - 1: a linear rise, then half a cosine down to 0 after the last.

    A short run keeps the shape: a warm-up of more than half of the steps is cut to half.
    """
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
