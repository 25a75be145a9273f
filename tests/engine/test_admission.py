"""The bound on waiting requests, on a faked clock."""

from __future__ import annotations

import pytest

from engine.admission import AdmissionQueue
from engine.errors import QueueFullError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def retry_after(queue: AdmissionQueue) -> int:
    with pytest.raises(QueueFullError) as caught:
        queue.check()
    return caught.value.retry_after


def test_the_limit_counts_only_requests_that_wait() -> None:
    queue = AdmissionQueue(2, Clock())
    queue.enter(1)
    queue.check()
    queue.enter(2)
    assert retry_after(queue) == 5, "no rate is known yet"
    queue.depart(1)
    queue.check()
    queue.enter(3)
    retry_after(queue)
    queue.leave(3)
    queue.check()


@pytest.mark.parametrize(
    ("seconds_each", "expected"), [(2.0, 20), (0.01, 1), (100.0, 60)], ids=["rate", "min", "max"]
)
def test_the_wait_follows_the_measured_rate(seconds_each: float, expected: int) -> None:
    clock = Clock()
    queue = AdmissionQueue(10, clock)
    for request_id in range(50):
        queue.enter(request_id)
        queue.depart(request_id)
        clock.now += seconds_each
    for request_id in range(100, 110):
        queue.enter(request_id)
    assert retry_after(queue) == expected


def test_a_departure_counts_once_and_a_leave_is_no_departure() -> None:
    clock = Clock()
    queue = AdmissionQueue(1, clock)
    queue.enter(1)
    queue.depart(1)
    queue.depart(1)
    queue.enter(2)
    queue.leave(2)
    queue.enter(3)
    clock.now = 1000.0
    assert retry_after(queue) == 5, "one departure is no rate"
