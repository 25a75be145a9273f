"""Who is admitted, and when: order, slots, room for pages, what preempted requests wait for."""

from __future__ import annotations

import pytest

from engine.errors import RequestError
from tests.engine.scheduler_bench import BLOCK, SchedulerBench, distinct


def test_no_more_requests_run_than_there_are_slots() -> None:
    bench = SchedulerBench(max_num_seqs=2)
    requests = [bench.add(distinct(3, 100 * i), max_tokens=2) for i in range(3)]
    bench.step()
    assert (bench.scheduler.queues.num_running, bench.scheduler.queues.num_waiting) == (2, 1)
    bench.step()
    bench.step()
    assert bench.live == {2: requests[2]}
    assert requests[2].slot is not None


def test_refuses_what_could_never_be_computed() -> None:
    bench = SchedulerBench(full_pages=4)
    with pytest.raises(RequestError, match="17 tokens need 5 full and 0 window pages"):
        bench.add(distinct(10), max_tokens=7)
    bench.add(distinct(10), max_tokens=6)
    bench.run()


def test_counts_what_is_still_to_prefill() -> None:
    bench = SchedulerBench(max_batch_tokens=8, max_num_seqs=1)
    bench.add(distinct(20))
    bench.add(distinct(10, 100))
    assert bench.scheduler.queues.prefill_remaining == 30
    bench.step()
    assert bench.scheduler.queues.prefill_remaining == 22


def test_a_request_that_does_not_fit_yet_waits() -> None:
    bench = SchedulerBench(full_pages=10, prefix_caching=False)
    bench.add(distinct(27), max_tokens=4)
    second = bench.add(distinct(20, 100), max_tokens=4)
    bench.step()
    assert second.slot is None, "7 pages and one to go on, of 10, are taken"
    bench.run()
    assert second.preemptions == 0


def test_every_slot_is_used_when_the_window_pool_holds_the_windows() -> None:
    """A decoding request was once counted with a whole prefill chunk: half of the slots idled."""
    bench = SchedulerBench(
        full_pages=2000,
        window_pages=8 * (8 // BLOCK + 3) + 64 // BLOCK,
        window_tokens=8,
        sink_tokens=2,
        max_num_seqs=8,
        max_batch_tokens=64,
    )
    for i in range(8):
        bench.add(distinct(200, 1000 * i), max_tokens=300)
    bench.step()
    assert bench.scheduler.queues.num_running == 8
    for _ in range(100):
        bench.step()
    assert bench.scheduler.queues.preemptions == 0


@pytest.mark.parametrize(("window_pages", "running"), [(13, 1), (14, 2)])
def test_prompts_are_admitted_with_room_for_a_chunk(window_pages: int, running: int) -> None:
    """Two windows hold 5 pages each, the chunks of a step 4 together."""
    bench = SchedulerBench(
        window_pages=window_pages, window_tokens=8, sink_tokens=2, max_batch_tokens=16
    )
    for i in range(2):
        bench.add(distinct(100, 1000 * i))
    bench.step()
    assert bench.scheduler.queues.num_running == running


def test_a_preempted_request_comes_back_before_those_that_wait() -> None:
    bench = SchedulerBench(full_pages=6, max_num_seqs=2, prefix_caching=False)
    bench.add(distinct(7), max_tokens=16)
    new = bench.add(distinct(7, 100), max_tokens=16)
    late = bench.add(distinct(3, 200), max_tokens=1)
    while not new.preemptions:
        bench.step()
    while new.slot is None:
        assert late.slot is None
        bench.step()
    bench.run()


def test_F09_preemption_under_pressure_stays_rare() -> None:
    """A request that was preempted waits for more room each time; a fourth time is too many.

    Twenty requests of which a third fit when grown; with a fixed margin some are preempted 4 times.
    """
    bench = SchedulerBench(full_pages=40, max_num_seqs=20, max_batch_tokens=32)
    requests = [bench.add(distinct(12 + i, 1000 * i), max_tokens=80) for i in range(20)]
    bench.run(3000)
    assert bench.scheduler.queues.preemptions > 0, "the pool is there to be too small"
    assert max(request.preemptions for request in requests) <= 3


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    bench = SchedulerBench()
    bench.add(distinct(16), max_tokens=1)
    bench.run()
    again = bench.add([*distinct(16), 5], max_tokens=1)
    assert bench.step() == {again.request_id: 1}
    assert bench.scheduler.queues.prefix_hit_tokens == 16


def test_pages_that_are_shared_leave_room_for_more_requests() -> None:
    """Admission once counted every copy in full: one ran where eight fit."""
    bench = SchedulerBench(full_pages=30, max_num_seqs=8, max_batch_tokens=100)
    for _ in range(8):
        bench.add(distinct(81), max_tokens=2)
    bench.step()
    bench.step()
    assert bench.scheduler.queues.num_running == 7, "the first has ended"
    assert bench.scheduler.queues.num_waiting == 0


def test_pages_that_are_only_cached_are_no_room_gained() -> None:
    """To share a page in use is free; to share a cached one takes it from what is available."""
    bench = SchedulerBench(full_pages=15, max_batch_tokens=8)
    bench.add(distinct(20), max_tokens=1)
    bench.run()
    echo = bench.add(distinct(40), max_tokens=0, prompt_logprobs=0)
    bench.step()
    assert (echo.registered, bench.pools.full.available) == (2, 13)
    other = bench.add([*distinct(20), 5, 5, 5], max_tokens=4)
    bench.step()
    assert other.slot is None, "8 more for the one, 6 for the other, of which 5 are cached"
    bench.run()
    assert other.preemptions == 0


def test_a_blocked_queue_is_not_searched_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full cache once cost a look at every block of the next prompt, step after step."""
    bench = SchedulerBench(full_pages=140, max_batch_tokens=400)
    bench.add(distinct(400), max_tokens=100)
    bench.step()
    blocked = bench.add([*distinct(100), *distinct(200, 9000)])
    monkeypatch.setattr(bench.pools, "match", lambda request: pytest.fail("searched"))
    for _ in range(5):
        assert len(bench.step()) == 1
    assert blocked.slot is None
    monkeypatch.undo()
    bench.run()
    assert blocked.cached == 100
