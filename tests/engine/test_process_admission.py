"""Requests at the door of an engine process: a full queue, whole calls, ids that do not fit."""

from __future__ import annotations

import pytest

from engine.client import Job
from engine.errors import (
    QueueFullError,
    RequestError,
)
from tests.engine.process_bench import (
    finish,
    greedy,
    run,
    running,
    submit,
    until,
)


def test_a_full_queue_is_refused_with_the_seconds_to_wait() -> None:
    async def test() -> None:
        async with running(max_queued_requests=3) as engine:
            generations = [submit(engine, [1, n], greedy(3)) for n in range(3)]
            with pytest.raises(QueueFullError) as caught:
                submit(engine, [9], greedy(1))
            assert caught.value.retry_after >= 1
            generations.pop().abort()
            generations.append(submit(engine, [9], greedy(1)))
            for generation in generations:
                await finish(generation)
            await finish(submit(engine, [9], greedy(1)))

    run(test)


def test_a_call_is_admitted_whole_or_not_at_all_and_its_prompt_charged_once() -> None:
    async def test() -> None:
        limits = {"max_queued_requests": 6, "max_queued_prefill_tokens": 100}
        async with running(max_batch_tokens=32, **limits) as engine:
            first = submit(engine, [1] * 40, greedy(60))
            with pytest.raises(QueueFullError) as caught:
                engine.submit_all([Job([n] * 61, greedy(1)) for n in range(2)])
            assert caught.value.reason == "prefill_backlog"
            with pytest.raises(QueueFullError), engine.hold(1, 61):
                pytest.fail("it was let in")
            prompt = [2] * 48
            same = engine.submit_all([Job(prompt, greedy(3))] * 4)  # 48, and 4 more each
            with pytest.raises(QueueFullError) as caught:
                engine.submit_all([Job(prompt, greedy(1))] * 2)
            assert caught.value.reason == "queue_full"
            with pytest.raises(RequestError):
                engine.submit_all([Job([3], greedy(1)), Job([2**31], greedy(1))])
            for generation in same:
                assert (await finish(generation)).finish_reason == "length"
            first.abort()
            await until(lambda: engine.stats.running + engine.stats.waiting == 0)
            assert engine.stats.generated_tokens < 60 + 12 + 1, "of the refused ones nothing ran"
            await finish(engine.submit_all([Job([4] * 99, greedy(1))])[0])

    run(test)


def test_token_ids_that_do_not_fit_are_refused_at_once() -> None:
    async def test() -> None:
        async with running() as engine:
            with pytest.raises(RequestError):
                submit(engine, [2**31], greedy(1))
            over = submit(engine, [100], greedy(1))
            assert (await finish(over)).finish_reason == "error"

    run(test)
