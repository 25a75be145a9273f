"""What a step will take, learnt from steps whose times follow a known law."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from engine.batch import Rule, Span
from engine.step_time import StepLoad, StepTimeModel
from tests.engine.paced_bench import CostLaw

LAW = CostLaw()


def loads(count: int, seed: int = 1) -> Iterator[StepLoad]:
    """Decode steps, and among them chunks of a prompt that grows long."""
    source, context = random.Random(seed), 0
    for step in range(count):
        rows = source.randrange(9)
        chunk = source.choice([64, 128, 512, 2048]) if step % 5 == 0 or not rows else 0
        pairs = chunk * (context + (chunk + 1) / 2)
        yield StepLoad(rows, rows * (50_000 + step), chunk, pairs)
        context += chunk


def learnt(
    noise: float = 0.0, outliers: tuple[int, ...] = (), factor: float = 1.0
) -> StepTimeModel:
    model, source = StepTimeModel(), random.Random(2)
    for place, load in enumerate(loads(400)):
        seconds = LAW(load) * factor * (1 + noise * source.uniform(-1, 1))
        model.observe(load, seconds * (50 if place in outliers else 1))
    return model


def worst_error(model: StepTimeModel, factor: float = 1.0) -> float:
    return max(abs(model.predict(load) / (LAW(load) * factor) - 1) for load in loads(300, seed=3))


def test_a_load_is_what_the_spans_compute() -> None:
    def span(rule: Rule, start: int, count: int) -> Span:
        return Span(1, 0, start, [0] * count, rule, [], [], True)

    spans = [span("decode", 99, 1), span("decode", 49, 1), span("decode", 10, 3)]
    load = StepLoad.of([*spans, span("prefill", 4, 2), span("prefill", 0, 1)])
    assert (load.rows, load.row_context, load.tokens) == (2, 150, 6)
    assert load.pairs == (11 + 12 + 13) + (5 + 6) + 1


def test_the_law_is_found() -> None:
    assert worst_error(learnt()) < 0.01


def test_noise_is_averaged() -> None:
    assert worst_error(learnt(noise=0.2)) < 0.2


@pytest.mark.parametrize("outliers", [(0, 1, 2), (50, 200), (398, 399)], ids=str)
def test_steps_that_took_fifty_times_as_long_move_it_little(outliers: tuple[int, ...]) -> None:
    """Kernels are compiled in the first steps, and a host may be busy at any time."""
    assert worst_error(learnt(outliers=outliers)) < 0.2


def test_a_lasting_change_is_followed() -> None:
    model = learnt()
    for load in loads(400, seed=4):
        model.observe(load, LAW(load) * 5)
    assert worst_error(model, factor=5) < 0.2


def test_long_decoding_does_not_forget_what_chunks_take() -> None:
    model = learnt()
    for _ in range(20_000):
        model.observe(StepLoad(4, 200_000), LAW(StepLoad(4, 200_000)))
    assert model.chunk_seconds(0, 2048) == pytest.approx(LAW.chunk(0, 2048), rel=0.1)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_duration_is_left_out(seconds: float) -> None:
    model, same = learnt(), learnt()
    model.observe(StepLoad(1, 1, 64, 64.0), seconds)
    load = StepLoad(3, 1000, 512, 1e8)
    assert model.predict(load) == same.predict(load)


@pytest.mark.parametrize("start", [0, 5000, 1_000_000])
@pytest.mark.parametrize("seconds", [0.003, 0.05, 0.2])
def test_the_chunk_that_fits_is_the_longest_one(start: int, seconds: float) -> None:
    model = learnt()
    tokens = model.tokens_within(seconds, start)
    assert tokens > 0
    assert model.chunk_seconds(start, tokens) <= seconds * 1.0001
    assert model.chunk_seconds(start, tokens + 1) > seconds or tokens == 4 * 2048


def test_no_more_than_four_times_what_was_measured_is_foreseen() -> None:
    model = StepTimeModel()
    assert model.tokens_within(1.0, 0) == 0
    model.observe(StepLoad(tokens=16, pairs=136.0), 1e-6)
    assert model.tokens_within(1.0, 0) == 64
    assert model.tokens_within(0.0, 0) == 0
