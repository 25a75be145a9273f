"""Waits beside long prompts on a simulated clock: B77 and the aim of `max_step_ms`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.loading import step_seconds
from engine.step_time import StepLoad
from server.config import ServerConfig
from tests.engine.paced_bench import BLOCK, CostLaw, PacedBench

AIM = 0.1  # seconds
CPU = CostLaw(
    step=0.015, with_chunk=0.005, row=2e-3, row_context=1e-8, token=4e-4, pair=2e-9
)  # a small model on a few cores


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


@pytest.mark.parametrize("noise", [0.0, 0.15], ids=["exact", "noisy"])
@pytest.mark.parametrize("law", [CostLaw(), CPU], ids=["GPU", "CPU"])
def test_B77_tokens_of_others_come_in_time_beside_a_long_prompt(law: CostLaw, noise: float) -> None:
    bench = PacedBench(AIM, law=law, noise=noise)
    streams = [bench.add(2000, 10**6) for _ in range(4)]
    bench.until(streams[-1], 50)
    begun = bench.now
    long = bench.add(200_000)
    bench.until(long)
    gaps = [gap for stream in streams for gap in stream.gaps(begun)]
    assert quantile(gaps, 0.99) <= AIM * (1.05 + noise)
    assert quantile(gaps, 0.5) >= AIM * 0.6, "no chunk is smaller than it must be"


def test_without_an_aim_the_same_tokens_wait_long() -> None:
    """What the aim is for: a step is as long as its tokens take."""
    bench = PacedBench(None, law=CPU)
    stream = bench.add(2000, 10**6)
    bench.until(stream, 50)
    begun = bench.now
    bench.until(bench.add(100_000))
    assert quantile(stream.gaps(begun), 0.5) > 8 * AIM


@pytest.mark.parametrize("law", [CostLaw(), CPU], ids=["GPU", "CPU"])
def test_the_price_for_the_long_prompt_is_bounded(law: CostLaw) -> None:
    """Its prefill beside four streams, against the same with whole steps: what a step costs before
    its first token is paid more often, and half a block is left empty on average."""
    fixed = law(StepLoad(rows=4, row_context=8000)) + law.with_chunk + law.chunk(50_000, BLOCK) / 2
    took = {}
    for aim in (None, AIM):
        bench = PacedBench(aim, law=law)
        streams = [bench.add(500, 10**6) for _ in range(4)]
        bench.until(streams[-1], 20)
        long = bench.add(100_000)
        bench.until(long)
        took[aim] = long.first_token
    assert took[AIM] < took[None] * 1.1 / (1 - fixed / AIM)


def test_a_prompt_alone_takes_whole_steps() -> None:
    bench = PacedBench(0.001)
    long = bench.add(100 * 2048)
    bench.until(long)
    assert len(bench.steps) == 100


def test_B77_first_tokens_of_short_prompts_come_in_time_beside_long_ones() -> None:
    """Eight long prompts come at once, then short ones all the time, beside four streams."""
    bench = PacedBench(AIM, noise=0.1, full_pages=20_000)
    streams = [bench.add(2000, 10**6) for _ in range(4)]
    bench.until(streams[-1], 50)
    flood = [bench.add(100_000) for _ in range(8)]
    begun, shorts = bench.now, []
    while not flood[0].times:
        shorts.append(bench.add(200, 4))
        bench.until(shorts[-1])
    assert len(shorts) > 20
    waits = [short.first_token for short in shorts]
    assert max(waits) < 4 * AIM
    assert quantile(waits, 0.9) < 2.5 * AIM
    gaps = [gap for stream in streams for gap in stream.gaps(begun)]
    assert quantile(gaps, 0.99) <= AIM * 1.2


def test_a_long_prompt_gets_on_whatever_the_rows_take() -> None:
    """Rows alone exceed the aim: a block in each step is guaranteed, to it and to a short one."""
    law = CostLaw(row=0.05)
    bench = PacedBench(AIM, law=law)
    streams = [bench.add(64, 10**6) for _ in range(8)]
    bench.until(streams[-1], 20)
    long = bench.add(64 * 300)
    bench.step()
    before = len(bench.steps)
    short = bench.add(64 * 3)
    bench.until(short)
    assert len(bench.steps) - before <= 4
    bench.until(long)
    assert len(bench.steps) - before <= 302


def test_chunks_get_a_third_of_a_step_whose_rows_exceed_the_aim() -> None:
    law = CostLaw(row=0.05)
    bench = PacedBench(AIM, law=law)
    streams = [bench.add(64, 10**6) for _ in range(8)]
    bench.until(streams[-1], 20)
    long = bench.add(100_000)
    for _ in range(20):
        bench.step()
    rows = law(StepLoad(8, 8 * 120)) + law.with_chunk
    assert long.request.computed > 15 * 2048, "not one block a step"
    assert max(bench.steps) < 1.6 * rows


def test_unknown_costs_are_approached_from_below() -> None:
    """The first chunks beside others, before anything of their size was measured."""
    bench = PacedBench(AIM, law=CPU)
    for _ in range(4):
        bench.add(5000, 10**6)
    for _ in range(200):
        bench.step()
    assert max(bench.steps) < 4 * AIM
    assert quantile(bench.steps, 0.9) < 1.1 * AIM


def test_a_graph_that_is_compiled_late_does_not_stop_chunks_for_long() -> None:
    bench = PacedBench(AIM)
    stream = bench.add(2000, 10**6)
    bench.until(stream, 50)
    long = bench.add(1_000_000)
    for _ in range(30):
        bench.step()
    bench.law = CostLaw(step=60.0)
    bench.step()
    bench.law = CostLaw()
    computed = long.request.computed
    for _ in range(10):
        bench.step()
    assert long.request.computed - computed > 10 * 500


@pytest.mark.parametrize(
    ("flags", "device", "seconds"),
    [
        ({}, "cuda", 0.1),
        ({}, "cpu", 0.4),
        ({"max_step_ms": 250}, "cpu", 0.25),
        ({"max_step_ms": 0}, "cuda", None),
    ],
    ids=["gpu", "cpu", "given", "no-aim"],
)
def test_the_aim_follows_the_device_unless_it_is_given(
    flags: dict[str, Any], device: str, seconds: float | None, tmp_path: Path
) -> None:
    config = ServerConfig.resolve(flags, tmp_path).engine()
    assert step_seconds(config, torch.device(device)) == seconds
