"""The bounds on what waits, and the waits that are told, on a faked clock."""

from __future__ import annotations

from array import array

import pytest

from engine.admission import (
    DEFAULT_WAIT,
    LONGEST_WAIT,
    AdmissionQueue,
    default_prefill_limit,
    prefill_charges,
)
from engine.errors import QueueFullError
from tests.engine.fake_clock import FakeClock


def make(
    clock: FakeClock | None = None, requests: int = 100, tokens: int = 10_000, small: int = 0
) -> AdmissionQueue:
    return AdmissionQueue(
        clock or FakeClock(1000.0),
        max_requests=requests,
        max_prefill_tokens=tokens,
        small_tokens=small,
    )


def refusal(queue: AdmissionQueue, requests: int = 1, tokens: int = 1) -> QueueFullError:
    with pytest.raises(QueueFullError) as caught:
        queue.check(requests, tokens)
    return caught.value


def test_the_request_limit_counts_only_requests_that_wait() -> None:
    queue = make(requests=2)
    queue.enter(1, 5)
    queue.check(1, 5)
    queue.enter(2, 5)
    assert refusal(queue).reason == "queue_full"
    queue.progress(1, 1, 0)
    queue.check(1, 5)
    queue.enter(3, 5)
    refusal(queue)
    queue.leave(3)
    queue.check(1, 5)


def test_the_prefill_limit_counts_the_work_that_is_left() -> None:
    queue = make(tokens=1000)
    queue.enter(1, 800)
    queue.check(1, 200)
    assert refusal(queue, 1, 201).reason == "prefill_backlog"
    queue.progress(1, 500, cached=400)
    queue.check(1, 700)
    refusal(queue, 1, 701)
    queue.progress(1, 800, cached=400)
    queue.check(1, 1000)
    queue.leave(1)
    assert queue.backlog == 0


def test_a_preempted_prompt_is_work_again() -> None:
    queue = make(tokens=1000)
    queue.enter(1, 800)
    queue.progress(1, 800, 0)
    queue.progress(1, 100, 0)
    assert queue.backlog == 700
    queue.leave(1)
    assert queue.backlog == 0


def test_a_call_is_taken_or_refused_as_a_whole() -> None:
    queue = make(requests=10, tokens=1000)
    queue.enter(1, 10)
    queue.check(9, 990)
    assert refusal(queue, 10, 10).reason == "queue_full"
    assert refusal(queue, 9, 991).reason == "prefill_backlog"


def test_what_finds_nothing_before_it_is_taken_whatever_its_size() -> None:
    queue = make(requests=10, tokens=1000)
    queue.check(128, 50_000)
    queue.enter(1, 1)
    refusal(queue, 128, 1)
    refusal(queue, 1, 50_000)


def test_B77_a_backlog_of_long_prompts_does_not_lock_short_ones_out() -> None:
    queue = make(tokens=1000, small=64)
    queue.enter(1, 1000)
    assert refusal(queue, 1, 65).reason == "prefill_backlog"
    queue.check(1, 64)


def test_a_call_that_is_tokenised_counts_by_what_is_known_of_it() -> None:
    queue = make(requests=3, tokens=1000)
    with queue.hold(2, 600):
        assert (queue.waiting, queue.backlog) == (2, 600)
        refusal(queue, 2, 1)
        refusal(queue, 1, 401)
        with pytest.raises(QueueFullError), queue.hold(2, 1):
            pytest.fail("it was let in")
    assert (queue.waiting, queue.backlog) == (0, 0)
    with pytest.raises(ZeroDivisionError), queue.hold(2, 600):
        raise ZeroDivisionError
    assert (queue.waiting, queue.backlog) == (0, 0)


@pytest.mark.parametrize(("seconds_each", "expected"), [(2.0, 6), (0.01, 1), (100.0, LONGEST_WAIT)])
def test_the_wait_for_a_place_follows_the_measured_rate(seconds_each: float, expected: int) -> None:
    clock = FakeClock(1000.0)
    queue = make(clock, requests=10)
    for request_id in range(10):
        queue.enter(request_id, 1)
    for request_id in range(40):
        clock.now += seconds_each
        queue.progress(request_id, 1, 0)
        queue.enter(request_id + 10, 1)
    assert refusal(queue, 3).retry_after == expected


@pytest.mark.parametrize(
    ("tokens_per_second", "expected"), [(100.0, 5), (10_000.0, 1), (1.0, LONGEST_WAIT)]
)
def test_the_wait_for_prefill_room_follows_the_measured_rate(
    tokens_per_second: float, expected: int
) -> None:
    """What came from the prefix cache was no work; an idle hour is no time of work."""
    clock = FakeClock(1000.0)
    queue = make(clock, tokens=1000)
    for request_id in range(20):
        queue.enter(request_id, 700)
        clock.now += 100 / tokens_per_second
        queue.progress(request_id, 600, cached=500)
        clock.now += 100 / tokens_per_second
        queue.progress(request_id, 700, cached=500)
        queue.leave(request_id)
        clock.now += 3600
    queue.enter(50, 900)
    wait = refusal(queue, 1, 600)
    assert (wait.retry_after, wait.reason) == (expected, "prefill_backlog")


def test_the_wait_for_a_call_larger_than_the_limit_is_until_nothing_is_before_it() -> None:
    clock = FakeClock(1000.0)
    queue = make(clock, tokens=1000)
    for request_id in range(2):
        queue.enter(request_id, 1000)
        clock.now += 10
        queue.progress(request_id, 1000, 0)
    queue.enter(2, 500)
    assert refusal(queue, 1, 90_000).retry_after == 5, "500 tokens at 100 a second"


def test_a_rate_needs_two_measurements_and_leaving_is_none() -> None:
    clock = FakeClock(1000.0)
    queue = make(clock, requests=1)
    queue.enter(1, 10)
    clock.now += 3.0
    queue.progress(1, 1, 0)
    queue.progress(1, 1, 0)
    queue.enter(2, 10)
    queue.leave(2)
    queue.enter(3, 10)
    clock.now += 1000.0
    assert refusal(queue).retry_after == DEFAULT_WAIT


def test_a_rate_follows_an_engine_that_slows_down() -> None:
    clock = FakeClock(1000.0)
    queue = make(clock, requests=1)
    for request_id in range(200):
        queue.enter(request_id, 1)
        clock.now += 0.1
        queue.progress(request_id, 1, 0)
    queue.enter(500, 1)
    assert refusal(queue).retry_after == 1
    clock.now += 600.0  # nothing came for ten minutes: an old rate is no promise
    assert refusal(queue).retry_after == LONGEST_WAIT


def test_after_a_restart_what_is_live_waits_again() -> None:
    queue = make(requests=2, tokens=1000)
    queue.enter(1, 600)
    queue.progress(1, 590, 0)
    queue.enter(2, 600, charge=8)
    queue.progress(2, 598, cached=592)
    queue.leave(2)
    assert (queue.waiting, queue.backlog) == (0, 10)
    queue.restart()
    assert (queue.waiting, queue.backlog) == (1, 600)
    queue.leave(1)
    queue.progress(1, 600, 0)
    assert (queue.waiting, queue.backlog) == (0, 0), "news of one that is gone"


def test_choices_of_a_prompt_count_little_until_it_is_known_that_nothing_is_shared() -> None:
    queue = make(tokens=1000)
    queue.enter(1, 600, charge=600)
    queue.enter(2, 600, charge=8)
    assert queue.backlog == 608
    queue.progress(2, 100, cached=0)
    assert queue.backlog == 1100


def buffers(*prompts: list[int]) -> list[bytes]:
    return [array("i", prompt).tobytes() for prompt in prompts]


def test_equal_prompts_of_a_call_are_charged_once_and_for_their_ends() -> None:
    one, other = list(range(100)), list(range(1, 101))
    assert prefill_charges(buffers(one, one, other, one), 16) == [100, 4, 100, 4]
    assert prefill_charges(buffers(one, one, other), None) == [100] * 3
    assert prefill_charges(buffers(one[:96], one[:96]), 16) == [96, 16], "a token is to compute"
    assert prefill_charges(buffers([1], [1]), 16) == [1, 1]


def test_the_default_holds_four_of_the_longest_prompts() -> None:
    assert default_prefill_limit(16_384) == 2**20
    assert default_prefill_limit(2**20) == 2**22
