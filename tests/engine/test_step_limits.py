"""F05: steps that find no memory are tried again in halves; what fails alone is at fault."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.batch import Batch, Span
from engine.step_limits import StepLimits
from tests.engine.core_bench import Bench, random_prompts
from tests.engine.fake_runner import NO_MEMORY, toy_generate

BLOCK = 4


def batch(rows: int, chunks: Sequence[int]) -> Batch:
    spans = [Span(i, i, 50, [0], "decode", [], [], True) for i in range(rows)]
    for i, count in enumerate(chunks, rows):
        spans.append(Span(i, i, 0, [0] * count, "prefill", [], [], False))
    return Batch(spans)


def test_F05_chunks_are_halved_down_to_a_block_then_alone_then_at_fault() -> None:
    limits = StepLimits(64, BLOCK)
    told = []
    for chunks in ([30, 20], [24], [12], [4]):
        assert limits.shrink(batch(2, chunks)) is None
        told.append((limits.chunk_tokens(64), limits.apart))
    assert told == [(24, False), (12, False), (4, False), (4, True)]
    assert [limits.shrink(batch(0, [4])) for _ in range(3)] == [None, None, 0]


def test_F05_rows_are_halved_down_to_the_one_at_fault() -> None:
    limits = StepLimits(64, BLOCK)
    assert limits.shrink(batch(5, [])) is None
    assert limits.shrink(batch(2, [])) is None
    assert [limits.shrink(batch(1, [])) for _ in range(2)] == [None, None]
    limits.went_well()
    assert [limits.shrink(batch(1, [])) for _ in range(3)] == [None, None, 0]


def test_F05_the_limits_recover_slowly_and_more_so_after_each_relapse() -> None:
    limits = StepLimits(64, BLOCK)
    recoveries: list[int] = []
    for _ in range(4):
        limits.shrink(batch(0, [64]))
        steps = 0
        while limits.chunk_tokens(64) < 64:
            limits.went_well()
            steps += 1
            if len(recoveries) in (1, 2) and steps == 5:
                limits.shrink(batch(0, [64]))  # again, before it had recovered
        recoveries.append(steps)
    assert recoveries[0] == recoveries[3] == 16, "a full recovery is a new beginning"
    assert recoveries[1] > 16


@pytest.mark.parametrize("memory", [4, 5, 9, 20, 40])
def test_F05_all_is_computed_in_steps_that_fit(memory: int) -> None:
    """Whatever a step may hold, down to one block and to as few rows."""
    bench = Bench(max_batch_tokens=64, full_pages=200, window_pages=200)
    prompts = random_prompts(8, seed=memory)
    bench.runner.memory = memory
    for request_id, prompt in enumerate(prompts):
        bench.add(request_id, prompt, max_tokens=12)
    bench.until_idle()
    for request_id, prompt in enumerate(prompts):
        assert bench.tokens(request_id) == toy_generate(prompt, 12)
        assert bench.last(request_id).finish_reason == "length"
    assert all(step.num_tokens <= memory for step in bench.runner.steps)
    stats = bench.channel.reports[-1].stats
    assert 0 < stats.memory_retries < len(bench.runner.steps)
    assert stats.generated_tokens == 8 * 12


def test_F05_rows_take_turns_where_not_all_of_them_fit() -> None:
    bench = Bench(max_batch_tokens=64)
    for request_id in range(4):
        bench.add(request_id, [request_id + 1] * 3, max_tokens=40)
    bench.turns(4)
    bench.runner.memory = 2
    bench.turns(20)
    counts = [len(bench.tokens(request_id)) for request_id in range(4)]
    assert max(counts) - min(counts) <= 2, "nobody starves"
    bench.runner.memory = None
    bench.until_idle()
    for request_id in range(4):
        assert bench.tokens(request_id) == toy_generate([request_id + 1] * 3, 40)
    assert max(len(step.spans) for step in bench.runner.steps[-8:]) == 4, "it has recovered"


@pytest.mark.parametrize("place", [0, 13, 29])
def test_F05_only_a_request_that_fails_alone_is_failed(place: int) -> None:
    bench = Bench(max_batch_tokens=32)
    prompts = random_prompts(3, seed=place)
    guilty = [7] * 30
    guilty[place] = NO_MEMORY
    bench.add(0, prompts[0], max_tokens=30)
    bench.turns(3)
    bench.add(9, guilty, max_tokens=5)
    for request_id in (1, 2):
        bench.add(request_id, prompts[request_id], max_tokens=20)
    bench.until_idle()
    assert bench.last(9).finish_reason == "error"
    assert bench.tokens(9) == []
    for request_id, count in ((0, 30), (1, 20), (2, 20)):
        assert bench.tokens(request_id) == toy_generate(prompts[request_id], count)
    bench.add(10, [7] * 30, max_tokens=2)
    bench.until_idle()
    assert bench.tokens(10) == toy_generate([7] * 30, 2)


def test_F05_a_deadline_and_an_abort_hold_while_nothing_fits() -> None:
    bench = Bench(max_batch_tokens=32)
    bench.runner.memory = 0
    bench.add(1, [3] * 20, max_tokens=5, deadline=bench.now + 2)
    bench.turns(2)
    assert bench.last(1).finish_reason == "deadline"
    bench.runner.memory = None
    bench.add(2, [3] * 20, max_tokens=5)
    bench.until_idle()
    assert bench.tokens(2) == toy_generate([3] * 20, 5)
