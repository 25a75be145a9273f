"""The place of the engine process: empty, taken, left."""

from __future__ import annotations

import asyncio

import pytest

from engine.child_protocol import ChildEndedError
from engine.messages import Abort, Report, Stats
from engine.running_child import RunningChild
from engine.starter import ReadyChild
from engine.step_note import StepNote
from engine.supervision import SupervisionPolicy
from tests.engine.fake_child import FakeChild
from tests.engine.fake_clock import FakeClock
from tests.engine.toy_info import toy_info

POLICY = SupervisionPolicy(seconds_per_token_cpu=0.5)


def make_place(*children: FakeChild) -> RunningChild:
    place = RunningChild(POLICY, FakeClock())
    for child in children:
        place.put(ReadyChild(child, toy_info()))
    return place


def test_an_empty_place_takes_messages_for_nobody_and_knows_no_step() -> None:
    place = make_place()
    place.send([Abort([1])])
    assert (place.pid, place.step(), place.step_seconds()) == (None, None, 0.0)
    asyncio.run(place.shut_down(1.0))
    asyncio.run(place.drop())


def test_speaks_for_the_child_that_is_there() -> None:
    child = FakeChild(pid=7)
    place = make_place(child)
    child.note = StepNote(began=0.0, tokens=3, request_ids=[5])
    child.says = [Report(updates=[], stats=Stats(step=9))]
    place.send([Abort([1]), Abort([2])])
    assert child.sent == [Abort([1]), Abort([2])]
    assert (place.pid, place.step(), place.step_seconds()) == (7, child.note, 1.5)
    assert asyncio.run(place.next_report()).stats.step == 9
    child.note = None
    with pytest.raises(ChildEndedError, match="hangs"):
        asyncio.run(place.next_report())


def test_one_child_follows_another_that_was_closed() -> None:
    first, second = FakeChild(pid=1), FakeChild(pid=2)
    place = make_place(first)
    asyncio.run(place.drop())
    assert (first.closed, place.pid) == (1, None)
    place.put(ReadyChild(second, toy_info()))
    place.send([Abort([1])])
    assert (first.sent, second.sent, place.pid) == ([], [Abort([1])], 2)


def test_a_child_whose_end_was_interrupted_is_not_forgotten() -> None:
    """The service may stop while its supervisor cleans up; the process must not be left."""
    child = FakeChild()
    place = make_place(child)
    child.interrupted = True
    with pytest.raises(InterruptedError):
        asyncio.run(place.drop())
    assert (child.closed, place.pid) == (0, child.pid)
    asyncio.run(place.drop())
    assert (child.closed, place.pid) == (1, None)
