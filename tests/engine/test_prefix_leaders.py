"""Equal beginnings are computed once: who waits for whom, and who does not."""

from __future__ import annotations

import pytest

from tests.engine.scheduler_bench import BLOCK, SchedulerBench, distinct


@pytest.mark.parametrize("length", [16, 17, 19])
def test_equal_prompts_are_computed_once(length: int) -> None:
    """B79, and n > 1. A prompt that ends with a block once let one copy in per step."""
    bench = SchedulerBench(max_num_seqs=8, max_batch_tokens=64)
    for _ in range(8):
        bench.add(distinct(length), max_tokens=5)
    assert bench.step() == {0: length}, "the others wait for the first"
    sizes = bench.step()
    own = length - (length - 1) // BLOCK * BLOCK
    assert sizes == {0: 1, **dict.fromkeys(range(1, 8), own)}
    bench.run()


def test_a_thousand_equal_prompts_share_their_pages() -> None:
    """B79: reference counts are exact, whatever order the requests come and go in."""
    bench = SchedulerBench(full_pages=80, max_num_seqs=16, max_batch_tokens=64)
    requests = [bench.add(distinct(41), max_tokens=3) for _ in range(1000)]
    bench.run(2000)
    assert all(request.output == [1, 1, 1] for request in requests)
    assert bench.scheduler.queues.prefix_hit_tokens == 999 * 40
    assert bench.scheduler.queues.preemptions == 0


def test_followers_keep_their_order() -> None:
    bench = SchedulerBench(max_num_seqs=2, max_batch_tokens=64)
    for _ in range(4):
        bench.add(distinct(17))
    assert bench.step() == {0: 17}
    assert bench.step() == {0: 1, 1: 1}


def test_waits_only_for_the_blocks_that_are_common() -> None:
    """A short prompt once waited for the whole of a long one that began like it."""
    bench = SchedulerBench(max_batch_tokens=16)
    start = distinct(8)
    long = bench.add([*start, *distinct(200, 2000)])
    short = bench.add([*start, 7, 7], max_tokens=1)
    assert bench.step() == {long.request_id: 16}
    assert bench.step() == {long.request_id: 14, short.request_id: 2}
    assert not short.is_prefill


def test_does_not_wait_for_blocks_that_are_there() -> None:
    """An echo request computes again what is cached; others need not wait for that."""
    bench = SchedulerBench(max_batch_tokens=8)
    bench.add(distinct(40), max_tokens=1)
    bench.run()
    echo = bench.add(distinct(40), max_tokens=0, prompt_logprobs=0)
    bench.step()
    other = bench.add(distinct(40), max_tokens=1)
    assert bench.step() == {echo.request_id: 4, other.request_id: 4}
    assert other.cached == 36


def test_goes_on_alone_when_its_leader_is_aborted() -> None:
    bench = SchedulerBench(max_batch_tokens=8)
    leader, follower = (bench.add(distinct(40), max_tokens=1) for _ in range(2))
    bench.step()
    assert follower.slot is None
    bench.abort(leader)
    assert bench.step() == {follower.request_id: 8}
    assert follower.cached == 8, "what the leader had computed is not lost"
    bench.run()


def test_does_not_wait_for_a_leader_that_stands_still() -> None:
    """Shortest first: the long leader gets nothing, and its short follower must not starve."""
    bench = SchedulerBench(max_batch_tokens=8, full_pages=500)
    bench.add(distinct(400))
    leader = bench.add([*distinct(8, 5000), *distinct(100, 6000)])
    bench.step()
    standing = leader.computed
    others = [bench.add(distinct(30, 7000 + 100 * i)) for i in range(3)]
    follower = bench.add([*distinct(8, 5000), 3], max_tokens=1)
    while not follower.output:
        bench.step()
    assert leader.computed == standing < 8, "the common blocks never came from the leader"
    assert any(other.is_prefill for other in others)


def test_followers_of_an_aborted_request_do_not_keep_it() -> None:
    bench = SchedulerBench(max_batch_tokens=8)
    requests = [bench.add(distinct(40), max_tokens=1) for _ in range(3)]
    bench.step()
    for request in requests:
        bench.abort(request)
    assert (bench.scheduler.queues.num_running, bench.scheduler.queues.num_waiting) == (0, 0)
    assert bench.pools.full.used == 0
    assert not bench.scheduler.schedule().spans
