"""Options of stage 2: what is refused, and the learning rate that they make."""

from __future__ import annotations

import pytest

from conversion.distil_options import DistilOptions
from conversion.errors import ConversionError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", -1),
        ("facts_share", 1.5),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("response_tokens", 16384),
    ],
)
def test_options_that_cannot_be(field: str, value: float) -> None:
    with pytest.raises(ConversionError, match=field) as caught:
        DistilOptions(**{field: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    options = DistilOptions(steps=8, warmup_steps=2, cooldown_steps=4, learning_rate=8.0)
    assert [options.rate(step, 8) for step in range(8)] == [4.0, 8.0, 8.0, 8.0, 8.0, 6.0, 4.0, 2.0]
    assert [options.rate(step, 6) for step in range(6)] == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]
    with pytest.raises(ConversionError, match="cooldown_steps must be at most 3"):
        DistilOptions(steps=3, cooldown_steps=4)


@pytest.mark.parametrize(("steps", "warmup"), [(600, 200), (150, 50), (2, 0)])
def test_a_short_training_reaches_its_learning_rate(steps: int, warmup: int) -> None:
    assert DistilOptions(steps=steps).warmup == warmup
