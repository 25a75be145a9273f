"""The rules of the scheduler, one by one. Random histories are in test_scheduler_properties."""

from __future__ import annotations

import random

import pytest

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


# Preemption


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
    assert bench.scheduler.queues.preemptions == 0


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
        oldest = bench.scheduler.queues.running[:1]
        computed = bench.step()
        assert all(request.request_id in computed for request in oldest)
        steps += 1
    work = sum(request.total for request in requests)
    assert steps <= 2 * work, "a token a step, twice over, is more than enough"
    assert max(request.preemptions for request in requests) <= 6


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
