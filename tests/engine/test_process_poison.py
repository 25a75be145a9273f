"""Requests that end engines: the guilty one fails alone, features give way before it does."""

from __future__ import annotations

import pytest

from engine.errors import (
    PoisonError,
)
from tests.engine.fake_runner import (
    KILL,
    NO_GRAPHS,
    NO_KERNELS,
    RAISE,
    toy_generate,
)
from tests.engine.process_bench import SLOW, finish, greedy, kill, run, running, submit, until


@pytest.mark.parametrize("poison", [RAISE, KILL], ids=["F08 exception in a step", "kill -9"])
def test_f03_a_request_that_ends_every_engine_fails_alone_and_is_refused(poison: int) -> None:
    async def test() -> None:
        async with running(model=SLOW) as engine:
            first_pid = engine.pid
            before = [submit(engine, [n, 7], greedy(60)) for n in range(3)]
            for generation in before:
                await generation.next_update()
            victim = submit(engine, [4, poison], greedy(5))
            neighbour = submit(engine, [9, 9], greedy(40))
            assert (await finish(victim)).finish_reason == "error"
            for n, generation in enumerate(before):
                await finish(generation)
                assert generation.output == toy_generate([n, 7], 60)
            await finish(neighbour)
            assert neighbour.output == toy_generate([9, 9], 40)
            assert engine.pid != first_pid
            assert engine.restarts == 4, "the first life and three resumes in vain"
            assert engine.recovery.poisoned == 1
            with pytest.raises(PoisonError):
                submit(engine, [4, poison], greedy(5, seed=77))
            await finish(submit(engine, [4, 5], greedy(5)))
            assert engine.restarts == 4

    run(test)


@pytest.mark.parametrize(("token", "off"), [(NO_GRAPHS, 1), (NO_KERNELS, 2)])
def test_f08_a_feature_that_fails_is_left_out_and_nothing_is_lost(token: int, off: int) -> None:
    async def test() -> None:
        async with running(model="broken kernels") as engine:
            generation, other = (
                submit(engine, [1, token], greedy(9)),
                submit(engine, [5], greedy(9)),
            )
            assert (await finish(generation)).finish_reason == "length"
            await finish(other)
            assert other.output == toy_generate([5], 9)
            assert engine.recovery.poisoned == 0
            assert (engine.restarts, engine.recovery.features_off) == (1 + off, off)
            kill(engine)
            await until(lambda: engine.restarts == 2 + off and engine.state == "ready")
            assert engine.recovery.features_off == 0, "tried again when nobody is suspected"

    run(test)


def test_f03_two_poisons_at_once_do_not_spend_the_budget() -> None:
    """Each costs four engines of the five that may be lost; one that is explained is given back."""

    async def test() -> None:
        async with running() as engine:
            victims = [submit(engine, [n, KILL], greedy(5)) for n in range(2)]
            good = submit(engine, [9, 9], greedy(40))
            for victim in victims:
                assert (await finish(victim)).finish_reason == "error"
            await finish(good)
            assert good.output == toy_generate([9, 9], 40)
            assert engine.recovery.poisoned == 2

    run(test)
