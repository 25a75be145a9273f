"""The rules of the scheduler, one by one. Random histories are in test_scheduler_properties."""

from __future__ import annotations

import random

import pytest

from engine.errors import RequestError
from tests.engine.scheduler_bench import BLOCK, SchedulerBench, distinct

# Decode first, chunks, fairness


def test_decode_comes_first_and_prefill_takes_what_is_left() -> None:
    bench = SchedulerBench(max_batch_tokens=10)
    short = [bench.add(distinct(2, start)) for start in (0, 100, 200)]
    bench.step()
    long = bench.add(distinct(30, 300))
    batch = bench.batch()
    assert [span.rule for span in batch.spans] == ["decode"] * 3 + ["prefill"]
    assert {s.request_id: len(s.tokens) for s in batch.spans} == {
        **{request.request_id: 1 for request in short},
        long.request_id: 7,
    }


def test_a_long_prompt_is_computed_in_chunks_and_sampled_once() -> None:
    bench = SchedulerBench(max_batch_tokens=8)
    bench.add(distinct(20))
    spans = [bench.batch().spans[0] for _ in range(3)]
    assert [(span.start, span.stop, span.sample) for span in spans] == [
        (0, 8, False),
        (8, 16, False),
        (16, 20, True),
    ]


def test_a_resumed_request_replays_its_output_apart_from_its_prompt() -> None:
    """F01: generated tokens follow the decode rule whenever they are computed."""
    bench = SchedulerBench(max_batch_tokens=100)
    bench.add(distinct(10), output=distinct(6, 500), max_tokens=8)
    spans = [bench.batch().spans[0] for _ in range(3)]
    assert [(span.rule, span.start, span.stop, span.sample) for span in spans] == [
        ("prefill", 0, 10, False),
        ("decode", 10, 16, True),
        ("decode", 16, 17, True),
    ]


def test_a_resumed_request_with_all_but_its_last_token_cached_is_computed_at_once() -> None:
    """F01: the loop found work and no step for it, and ended the engine (a seed showed it)."""
    bench = SchedulerBench(max_batch_tokens=100)
    bench.add(distinct(12), max_tokens=1)
    bench.run()
    bench.add(distinct(12), output=[500], max_tokens=3)
    (span,) = bench.batch().spans
    assert (span.rule, span.start, span.stop, span.sample) == ("decode", 12, 13, True)


def test_an_echo_request_computes_its_prompt_and_samples_nothing() -> None:
    bench = SchedulerBench()
    bench.add(distinct(6), max_tokens=0, prompt_logprobs=1)
    (span,) = bench.batch().spans
    assert (span.stop, span.sample) == (6, False)
    assert not bench.live


def test_short_prompts_get_half_of_the_budget_beside_a_long_one() -> None:
    """B77: a flood of long prompts does not keep short ones waiting, nor the reverse."""
    bench = SchedulerBench(max_batch_tokens=16)
    long = bench.add(distinct(200))
    bench.step()
    short = [bench.add(distinct(5, 5000 + 100 * i)) for i in range(3)]
    sizes = bench.step()
    assert sizes[long.request_id] == 8
    assert [sizes.get(request.request_id, 0) for request in short] == [5, 3, 0]


def test_the_oldest_takes_what_short_prompts_leave() -> None:
    bench = SchedulerBench(max_batch_tokens=16)
    long, short = bench.add(distinct(200)), bench.add(distinct(3, 5000))
    assert bench.step() == {long.request_id: 13, short.request_id: 3}


def test_no_more_requests_run_than_there_are_slots() -> None:
    bench = SchedulerBench(max_num_seqs=2)
    requests = [bench.add(distinct(3, 100 * i), max_tokens=2) for i in range(3)]
    bench.step()
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (2, 1)
    bench.step()
    bench.step()
    assert bench.live == {2: requests[2]}
    assert requests[2].slot is not None


# Pages: refusal, preemption, room


def test_refuses_what_could_never_be_computed() -> None:
    bench = SchedulerBench(full_pages=4)
    with pytest.raises(RequestError, match="17 tokens need 5 full and 0 window pages"):
        bench.add(distinct(10), max_tokens=7)
    bench.add(distinct(10), max_tokens=6)
    bench.run()


def test_F09_preempts_the_newest_and_computes_it_again() -> None:
    """The oldest is never preempted; output is kept and replayed."""
    bench = SchedulerBench(full_pages=6, prefix_caching=False)
    old = bench.add(distinct(7), max_tokens=16)
    new = bench.add(distinct(7, 100), max_tokens=16)
    while not new.preemptions:
        assert all(span.epoch == 0 for span in bench.batch().spans)
    kept = list(new.output)
    assert kept
    assert new.computed == 0
    assert not new.full_blocks
    assert new.slot is None
    while new.slot is None:
        batch = bench.batch()
    assert {span.request_id: span.epoch for span in batch.spans}[new.request_id] == 1
    bench.run()
    assert (old.preemptions, new.preemptions) == (0, 1)
    assert new.output[: len(kept)] == kept
    assert len(new.output) == 16


def test_evicts_cached_pages_before_it_preempts() -> None:
    bench = SchedulerBench(full_pages=6)
    bench.add(distinct(16), max_tokens=1)
    bench.run()
    assert bench.pools.full.cached == 4
    bench.add(distinct(7, 100), max_tokens=16)
    bench.run()
    assert bench.scheduler.preemptions == 0


def test_a_preempted_request_leaves_its_budget_to_the_step() -> None:
    """The oldest prompt takes the pages of one that was to decode in this very step."""
    bench = SchedulerBench(full_pages=39, max_batch_tokens=8, prefix_caching=False)
    bench.add(distinct(80), max_tokens=1)
    bench.add(distinct(60, 2000), max_tokens=1)
    new = bench.add(distinct(3, 3000), max_tokens=40)
    sizes: dict[int, int] = {}
    while not new.preemptions:
        sizes = bench.step()
    assert new.request_id not in sizes
    assert sum(sizes.values()) == 8
    bench.run()


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
    assert bench.scheduler.preemptions > 0, "the pool is there to be too small"
    assert max(request.preemptions for request in requests) <= 3


@pytest.mark.parametrize("seed", range(30))
def test_F09_no_livelock_in_pools_that_are_always_too_small(seed: int) -> None:
    """Requests that fit one or two at a time, with window, chunks and shared beginnings at random:
    the oldest gets on in every step, and nothing is computed again more than a few times."""
    source = random.Random(seed)
    longest = 60
    bench = SchedulerBench(
        full_pages=longest // BLOCK + source.randrange(1, 12),
        window_pages=source.choice([0, 12]),
        window_tokens=source.choice([4, 8]),
        sink_tokens=2,
        max_num_seqs=source.randrange(2, 9),
        max_batch_tokens=source.choice([8, 16, 64]),
        prefix_caching=source.random() < 0.5,
    )
    requests = []
    for i in range(16):
        prompt = distinct(source.randrange(1, 30), source.choice([0, 1000 * i]))
        requests.append(bench.add(prompt, max_tokens=source.randrange(1, longest - 30)))
    steps = 0
    while bench.live:
        oldest = bench.scheduler._running[:1]
        computed = bench.step()
        assert all(request.request_id in computed for request in oldest)
        steps += 1
    work = sum(request.total for request in requests)
    assert steps <= 2 * work, "a token a step, twice over, is more than enough"
    assert max(request.preemptions for request in requests) <= 6


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
    assert bench.scheduler.num_running == 8
    for _ in range(100):
        bench.step()
    assert bench.scheduler.preemptions == 0


@pytest.mark.parametrize(("window_pages", "running"), [(13, 1), (14, 2)])
def test_prompts_are_admitted_with_room_for_a_chunk(window_pages: int, running: int) -> None:
    """Two windows hold 5 pages each, the chunks of a step 4 together."""
    bench = SchedulerBench(
        window_pages=window_pages, window_tokens=8, sink_tokens=2, max_batch_tokens=16
    )
    for i in range(2):
        bench.add(distinct(100, 1000 * i))
    bench.step()
    assert bench.scheduler.num_running == running


def test_a_request_that_does_not_fit_yet_waits() -> None:
    bench = SchedulerBench(full_pages=10, prefix_caching=False)
    bench.add(distinct(27), max_tokens=4)
    second = bench.add(distinct(20, 100), max_tokens=4)
    bench.step()
    assert second.slot is None, "7 pages and one to go on, of 10, are taken"
    bench.run()
    assert second.preemptions == 0


# Prefixes


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    bench = SchedulerBench()
    bench.add(distinct(16), max_tokens=1)
    bench.run()
    again = bench.add([*distinct(16), 5], max_tokens=1)
    assert bench.step() == {again.request_id: 1}
    assert bench.scheduler.prefix_hit_tokens == 16


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


def test_followers_keep_their_order() -> None:
    bench = SchedulerBench(max_num_seqs=2, max_batch_tokens=64)
    for _ in range(4):
        bench.add(distinct(17))
    assert bench.step() == {0: 17}
    assert bench.step() == {0: 1, 1: 1}


def test_a_thousand_equal_prompts_share_their_pages() -> None:
    """B79: reference counts are exact, whatever order the requests come and go in."""
    bench = SchedulerBench(full_pages=80, max_num_seqs=16, max_batch_tokens=64)
    requests = [bench.add(distinct(41), max_tokens=3) for _ in range(1000)]
    bench.run(2000)
    assert all(request.output == [1, 1, 1] for request in requests)
    assert bench.scheduler.prefix_hit_tokens == 999 * 40
    assert bench.scheduler.preemptions == 0


def test_pages_that_are_shared_leave_room_for_more_requests() -> None:
    """Admission once counted every copy in full: one ran where eight fit."""
    bench = SchedulerBench(full_pages=30, max_num_seqs=8, max_batch_tokens=100)
    for _ in range(8):
        bench.add(distinct(81), max_tokens=2)
    bench.step()
    bench.step()
    assert bench.scheduler.num_running == 7, "the first has ended"
    assert bench.scheduler.num_waiting == 0


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
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (0, 0)
    assert bench.pools.full.used == 0
    assert not bench.scheduler.schedule().spans


# Ends


def test_abort_of_an_unknown_request_is_ignored() -> None:
    bench = SchedulerBench()
    bench.scheduler.finish(77)
    assert not bench.scheduler.schedule().spans


def test_abort_between_schedule_and_update_is_harmless() -> None:
    """B71: the client leaves while its step is being computed."""
    bench = SchedulerBench()
    gone, stays = bench.add(distinct(6)), bench.add(distinct(6, 100))
    batch = bench.scheduler.schedule()
    bench.abort(gone)
    bench.scheduler.update(batch, {0: 5, 1: 5})
    bench.scheduler.check_integrity()
    assert (gone.output, stays.output) == ([], [5])


def test_counts_what_is_still_to_prefill() -> None:
    bench = SchedulerBench(max_batch_tokens=8, max_num_seqs=1)
    bench.add(distinct(20))
    bench.add(distinct(10, 100))
    assert bench.scheduler.prefill_remaining == 30
    bench.step()
    assert bench.scheduler.prefill_remaining == 22


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
