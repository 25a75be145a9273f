"""Engine processes that are started again: how often, how long, and what ends the tries."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import (
    EngineUnavailableError,
)
from engine.supervision import RestartBudget, SupervisionPolicy
from tests.engine.fake_clock import FakeClock
from tests.engine.fake_runner import (
    toy_generate,
)
from tests.engine.process_bench import (
    DEADLINE,
    finish,
    greedy,
    kill,
    run,
    running,
    submit,
    until,
)


def test_the_restart_budget_ends_in_dead_with_a_reason() -> None:
    async def test() -> None:
        policy = SupervisionPolicy(max_restarts=2, first_backoff=0.01, stop_seconds=DEADLINE)
        async with running(model="slow:0.05", policy=policy) as engine:
            generation = submit(engine, [1], greedy(120))
            for lost in range(3):
                await until(lambda: engine.state == "ready")
                assert engine.restarts == lost
                await generation.next_update()
                kill(engine)
                await until(lambda: engine.state != "ready")
            reason = await engine.wait_dead()
            assert "lost 3 times within 600 s" in reason
            assert "killed by signal 9" in reason
            with pytest.raises(EngineUnavailableError, match="dead"):
                await finish(generation)
            with pytest.raises(EngineUnavailableError, match="dead"):
                submit(engine, [1], greedy(1))

    run(test)


@pytest.mark.parametrize(
    ("kind", "trouble"),
    [
        pytest.param("folder", "the model folder is not usable", id="F27 folder gone"),
        pytest.param("device", "the engine does not start", id="F06 device lost"),
    ],
)
def test_starts_that_fail_spend_no_budget_and_say_why(
    tmp_path: Path, kind: str, trouble: str
) -> None:
    """It stays in restarting, live requests wait, and all goes on when the cause is gone."""
    marker = tmp_path / "model"

    async def test() -> None:
        marker.touch()
        policy = SupervisionPolicy(max_restarts=1, first_backoff=0.01, max_backoff=0.02)
        async with running(model=f"once:{kind}:{marker}", policy=policy) as engine:
            generation = submit(engine, [1], greedy(100))
            await generation.next_update()
            kill(engine)
            await until(lambda: engine.restarts >= 2 and engine.trouble is not None)
            assert engine.state == "restarting"
            assert engine.trouble == trouble
            marker.touch()
            await finish(generation)
            assert generation.output == toy_generate([1], 100)
            assert engine.trouble is None

    run(test)


def test_starts_that_fail_for_too_long_end_in_dead(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "model").touch()
        policy = SupervisionPolicy(start_seconds=0.01, first_backoff=0.01)
        async with running(model=f"once:folder:{tmp_path / 'model'}", policy=policy) as engine:
            kill(engine)
            assert "model: there is no config.json" in await engine.wait_dead()

    run(test)


def test_restart_budget_slides_and_backs_off_on_a_faked_clock() -> None:
    """F18: only differences of the injected clock matter, never where it stands."""
    for start in (-86400.0, 0.0, 1e9):
        clock = FakeClock(start)
        budget = RestartBudget(
            SupervisionPolicy(max_restarts=4, restart_window=600, first_backoff=1, max_backoff=3),
            clock,
        )
        assert [budget.spend() for _ in range(5)] == [0.0, 1.0, 2.0, 3.0, None]
        clock.now += 599
        assert budget.spend() is None
        clock.now += 1
        assert budget.spend() == 0.0
