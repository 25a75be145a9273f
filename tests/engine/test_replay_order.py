"""Who is given to a new engine, in which order, and who is to blame. F03 without an engine."""

from __future__ import annotations

import random

from engine.replay_order import ReplayOrder


def started(*request_ids: int, max_resumes: int = 3) -> ReplayOrder:
    order = ReplayOrder(max_resumes)
    for request_id in request_ids:
        assert order.enter(request_id) == [request_id]
    return order


def test_one_crash_gives_everything_back_in_order_of_arrival() -> None:
    order = started(5, 3, 9)
    order.got_further(9)
    assert order.crash([3, 9]) is None
    assert order.restart() == [5, 3, 9]
    assert order.enter(10) == [10], "nobody is suspected, so nobody waits"


def test_f03_suspects_are_tried_one_by_one_after_those_that_went_on() -> None:
    order = started(1, 2, 3, 4)
    order.crash([1, 2, 3])
    assert order.restart() == [1, 2, 3, 4]
    assert order.got_further(1) == []
    order.crash([1, 2, 3])  # 4 waited for a slot, 1 had got on
    assert order.restart() == [1]
    assert order.enter(5) == [], "a new one could be mistaken for the suspect on trial"
    assert order.got_further(1) == [2]
    assert order.got_further(1) == [], "what it brings later proves nothing new"
    assert order.got_further(2) == [3]
    assert order.got_further(3) == [4, 5], "the rest when the last suspect is cleared"
    assert order.enter(6) == [6]


def test_f03_only_the_guilty_one_is_convicted() -> None:
    order = started(1, 2, 3)
    for _ in range(2):
        assert order.crash([1, 2, 3]) is None
        first = order.restart()
    assert first == [1], "three suspects, one by one"
    assert order.got_further(1) == [2]
    assert order.crash([1, 2]) is None, "2 was resumed twice in vain; a third time is allowed"
    assert order.restart() == [1], "it got on in the life before"
    assert order.got_further(1) == [3], "the least blamed first"
    assert order.got_further(3) == [2]
    assert order.crash([1, 2, 3]) == (2, 4)
    order.leave(2)
    assert order.restart() == [1, 3]


def test_getting_further_starts_the_count_anew() -> None:
    """A stream that was there at every crash of others, but went on in between, is no suspect."""
    order = started(1)
    for _ in range(20):
        assert order.got_further(1) == []
        assert order.crash([1]) is None
        assert order.restart() == [1]


def test_who_was_not_in_the_step_is_not_blamed() -> None:
    order = started(1, 2)
    for _ in range(3):
        assert order.crash([1]) is None
        order.restart()
        order.got_further(2)
    assert order.crash([1]) == (1, 4)
    assert not order._live[2].is_suspect


def test_between_two_steps_all_that_got_no_further_are_blamed() -> None:
    order = started(1, 2)
    order.got_further(1)
    order.crash(None)
    order.restart()
    order.got_further(1)
    order.crash(None)
    assert [standing.crashes for standing in order._live.values()] == [0, 2]


def test_a_suspect_that_is_aborted_makes_room_for_the_next() -> None:
    order = started(1, 2, 3)
    for _ in range(2):
        order.crash([1, 2])
        first = order.restart()
    assert first == [1]
    assert order.leave(2) == [], "one that waits"
    assert order.leave(1) == [3], "the one on trial"
    assert order.leave(3) == []


def test_a_request_is_sent_once_to_each_engine_and_all_are_sent_in_the_end() -> None:
    """Random histories: no request is lost, none is sent twice, and one poison is always found."""
    for seed in range(300):
        source = random.Random(seed)
        order = ReplayOrder(3)
        poison = source.randrange(6)
        live, sent = set(range(6)), set[int]()
        for request_id in range(6):
            sent |= set(order.enter(request_id))
        crashes, convicted = 0, None
        while live:
            runs = sorted(sent & live)
            assert runs, "somebody is always at work"
            step = source.sample(runs, source.randint(1, len(runs)))
            if poison in step:
                crashes += 1
                guilty = order.crash(step)
                if guilty is not None:
                    convicted = guilty[0]
                    order.leave(convicted)
                    live.discard(convicted)
                sent = set(order.restart())
                continue
            for request_id in step:
                news = order.got_further(request_id)
                if source.random() < 0.1:
                    live.discard(request_id)
                    news += order.leave(request_id)
                assert not sent & set(news)
                sent |= set(news)
        assert convicted == poison
        assert crashes == 4
