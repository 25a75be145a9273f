"""Learning-rate schedules at the steps where they turn."""

from __future__ import annotations

import pytest

from conversion.schedule import cooldown, warmup_constant, warmup_cosine


def test_a_cosine_rises_in_a_line_and_falls_to_nothing() -> None:
    rates = [warmup_cosine(step, 600, 100) for step in range(600)]
    assert rates[:100] == pytest.approx([(step + 1) / 100 for step in range(100)])
    assert rates[100] == 1.0
    assert rates[350] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-4
    assert rates[100:] == sorted(rates[100:], reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_short_run_still_rises_and_falls(steps: int) -> None:
    rates = [warmup_cosine(step, steps, 100) for step in range(steps)]
    assert max(rates) == 1.0
    assert min(rates) > 0


def test_a_constant_rate_stays() -> None:
    rates = [warmup_constant(step, 4) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup_constant(0, 0) == 1.0


def test_a_cooldown_falls_to_nothing_after_the_last_step() -> None:
    assert [cooldown(step, 8, 4) for step in range(8)] == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert {cooldown(step, 8, 0) for step in range(8)} == {1.0}
