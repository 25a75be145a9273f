"""What is remembered of guilty requests, and for how long."""

from __future__ import annotations

from engine.poison import PoisonList
from engine.request import SamplingParams
from tests.engine.fake_clock import FakeClock

PARAMS = SamplingParams(seed=1, logit_bias={3: 1.0, 2: 0.5})
SAME = SamplingParams(seed=2, logit_bias={2: 0.5, 3: 1.0})


def test_a_retry_is_recognised_whatever_its_seed() -> None:
    poison = PoisonList(60, FakeClock())
    poison.add(b"1234", PARAMS)
    assert poison.holds(b"1234", SAME)
    assert not poison.holds(b"123", SAME)
    assert not poison.holds(b"1234", SamplingParams(logit_bias={3: 1.0}))


def test_it_is_forgotten_after_a_while_by_the_injected_clock() -> None:
    clock = FakeClock()
    poison = PoisonList(60, clock)
    poison.add(b"1", PARAMS)
    clock.now = 30
    poison.add(b"2", PARAMS)
    clock.now = 60
    assert not poison.holds(b"1", PARAMS)
    assert poison.holds(b"2", PARAMS)
    poison.add(b"2", PARAMS)
    clock.now = 119
    assert poison.holds(b"2", PARAMS), "a new conviction counts from its own time"


def test_memory_is_bounded() -> None:
    poison = PoisonList(60, FakeClock())
    for number in range(1500):
        poison.add(number.to_bytes(4), PARAMS)
    assert len(poison) == 1024
    assert poison.holds((1499).to_bytes(4), PARAMS)
    assert not poison.holds((0).to_bytes(4), PARAMS)
