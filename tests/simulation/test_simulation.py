"""Thousands of seeds, each a service with clients and faults of its own; see the package's page."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from tests.simulation.loop import Signal, StuckError, run_simulated
from tests.simulation.scenario import CRASH_POINTS, draw_scenario
from tests.simulation.simulation import simulate

CHUNKS = 5  # tests that the seeds are divided into, so that none of them lasts long


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_f01_to_f05_f07_f09_f13_f24_every_seed_keeps_the_rules(
    chunk: int, simulation_seeds: range
) -> None:
    for seed in simulation_seeds[chunk::CHUNKS]:
        outcome = simulate(seed)
        if outcome.problems:
            found = "\n  ".join(outcome.problems)
            pytest.fail(f"seed {seed}:\n  {found}\nagain: python -m tests.simulation {seed} -v")


def test_a_seed_is_one_history() -> None:
    """What a failing seed prints must be what failed."""
    for seed in range(40):
        first, second = simulate(seed), simulate(seed)
        assert first.history.lines() == second.history.lines()
        assert len(first.history.lines()) > 3


def test_the_scenarios_hold_what_they_are_meant_to() -> None:
    """Every fault and every manner of a client occurs often among the seeds of one run."""
    seen: Counter[str] = Counter()
    for seed in range(2000):
        scenario = draw_scenario(seed)
        seen["drain"] += scenario.drain is not None
        seen["interrupted load"] += scenario.interrupted_load is not None
        seen["small budget"] += scenario.policy.max_restarts < 3
        seen["little memory"] += scenario.memory is not None
        seen["tiny pool"] += scenario.full_pages <= 16
        for life in scenario.lives:
            seen["hang"] += life.hang is not None
            seen["slow step"] += life.slow is not None
            seen[f"load: {life.load_fault}"] += 1
            seen[f"crash: {life.crash and life.crash[1]}"] += 1
            seen[f"frame: {life.bad_frame and life.bad_frame[1]}"] += 1
        for client in scenario.clients:
            seen[f"poison: {client.poison}"] += 1
            seen["leaves"] += client.leaves_after is not None or client.leaves_at is not None
            seen["slow reader"] += client.read_pause > 0
            seen["deadline"] += client.deadline is not None
            seen["choices"] += len(client.choices) > 1
            seen["echo"] += client.choices[0].prompt_logprobs is not None
            seen["no output"] += client.choices[0].max_tokens == 0
    expected = [f"crash: {point}" for point in CRASH_POINTS]
    expected += [f"poison: {name}" for name in ("raise", "kill", "hang", "not finite", "no memory")]
    expected += [f"load: {fault}" for fault in ("crash", "hang", "refusal")]
    expected += ["frame: to engine", "frame: from engine"]
    rare = {name: seen[name] for name in [*expected, *seen] if seen[name] < 20}
    assert not rare


def test_time_jumps_and_nothing_waits() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        signal, times = Signal(loop), []
        loop.call_later(86_400, signal.wake)
        await signal.wait(loop.time() + 3600)
        times.append(loop.time())
        await signal.wait()
        times.append(loop.time())
        return times

    assert run_simulated(main) == pytest.approx([3600, 86_400])


def test_a_wait_for_nothing_is_told_from_a_long_one() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(StuckError):
        run_simulated(main)
