"""Rules of resuming, at every turn at which an engine can be lost, around the toy model.

Two loops, one after the other: the first is lost after some turns, with or without its last report;
the second goes on. Both together must say exactly what one undisturbed loop says.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from engine.client import Generation
from engine.core import EngineCore
from engine.live_requests import LiveRequests
from engine.messages import Add, RequestUpdate
from engine.request import SamplingParams
from engine.step_note import StepNote
from tests.engine.fake_channel import FakeChannel
from tests.engine.fake_runner import FakeRunner, toy_generate
from tests.engine.toy_info import toy_info, toy_scheduler

Requests = list[tuple[list[int], SamplingParams]]

GREEDY = SamplingParams(temperature=0.0, max_tokens=9)
DRAWN = SamplingParams(seed=11, max_tokens=12, logprobs=2)
ECHO = SamplingParams(temperature=0.0, max_tokens=4, logprobs=1, prompt_logprobs=1)
PROMPT_ONLY = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0)
SHARED = list(range(20, 44))
REQUESTS: Requests = [
    ([1, 2, 3], GREEDY),
    ([4] * 13, DRAWN),
    (list(range(30)), ECHO),
    (list(range(40, 61)), PROMPT_ONLY),
    (SHARED, GREEDY),
    ([*SHARED, 7], GREEDY),  # waits for a slot, then hits the pages of the one before
]


class Life:
    """One engine after another over the same live requests; a tick of its clock for each look."""

    def __init__(self, requests: Requests) -> None:
        self.now = 0.0
        self.note: StepNote | None = None
        self.live = LiveRequests(max_resumes=3)
        self.generations = []
        self.first: list[Add] = []
        for request_id, (prompt, params) in enumerate(requests):
            generation = Generation(request_id, prompt, params, lambda _: None)
            buffer = array("i", prompt).tobytes()
            add = Add(request_id=request_id, params=params, prompt=buffer, arrival=self.now)
            self.first += self.live.add(generation, add)
            self.generations.append(generation)

    def engine(self, messages: list[Add], **pools: Any) -> tuple[EngineCore, FakeChannel]:
        info, channel = toy_info(**pools), FakeChannel()
        scheduler = toy_scheduler(info, max_batch_tokens=8)
        channel.inbox += messages
        return EngineCore(scheduler, FakeRunner(info), channel, self.tick, self.set_note), channel

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def set_note(self, note: StepNote | None) -> None:
        self.note = note

    def deliver(self, channel: FakeChannel) -> None:
        for report in channel.reports:
            for update in report.updates:
                channel.inbox += self.live.push(update)
        channel.reports.clear()

    def run(self, core: EngineCore, channel: FakeChannel, until: Callable[[], bool]) -> None:
        while not until():
            core.turn()
            self.deliver(channel)

    def answers(self) -> list[RequestUpdate]:
        updates = [generation.take() for generation in self.generations]
        assert all(update is not None and update.finish_reason for update in updates)
        return [update for update in updates if update is not None]


def undisturbed() -> list[RequestUpdate]:
    life = Life(REQUESTS)
    core, channel = life.engine(life.first)
    life.run(core, channel, lambda: not len(life.live))
    return life.answers()


def without_times(updates: list[RequestUpdate]) -> list[RequestUpdate]:
    return [msgspec.structs.replace(update, timing=None) for update in updates]


TURNS = 30


def test_the_sweep_covers_the_whole_run() -> None:
    life = Life(REQUESTS)
    core, channel = life.engine(life.first)
    for _ in range(TURNS):
        core.turn()
    life.deliver(channel)
    assert not len(life.live)


@pytest.mark.parametrize("delivered", [True, False], ids=["last report came", "last report lost"])
@pytest.mark.parametrize("turns", range(1, TURNS, 2))
def test_f01_f02_lost_after_any_turn(turns: int, delivered: bool) -> None:
    whole = undisturbed()
    assert whole[5].cached == 24, "the prefix was hit"
    life = Life(REQUESTS)
    core, channel = life.engine(life.first)
    for turn in range(turns):
        core.turn()
        if delivered or turn + 1 < turns:
            life.deliver(channel)
    assert life.live.lose_engine(None if life.note is None else life.note.request_ids) is None
    core, channel = life.engine(life.live.resume())
    life.run(core, channel, lambda: not len(life.live))
    answers = life.answers()
    for want, got in zip(without_times(whole), without_times(answers), strict=True):
        if got.request_id == 5:  # the one whose hit depends on who came first
            want, got = (msgspec.structs.replace(u, cached=0) for u in (want, got))
        assert got == want
    for update, (_, params) in zip(answers, REQUESTS, strict=True):
        check_times(update, params, life.now)


def check_times(update: RequestUpdate, params: SamplingParams, now: float) -> None:
    timing = update.timing
    assert timing is not None
    assert timing.queue is not None
    assert timing.prefill is not None
    assert 0 < timing.queue + timing.prefill + (timing.decode or 0.0) <= now
    assert (timing.decode is not None) == (params.max_tokens > 0)


def test_times_are_those_of_the_request_not_of_the_second_engine() -> None:
    life = Life([([1, 2, 3], GREEDY)])
    core, channel = life.engine(life.first)
    life.run(core, channel, lambda: len(life.generations[0].output) >= 4)
    before = life.generations[0].received.progress().timing
    life.now += 1000.0  # the outage
    life.live.lose_engine(None)
    core, channel = life.engine(life.live.resume())
    life.run(core, channel, lambda: not len(life.live))
    timing = life.answers()[0].timing
    assert timing is not None
    assert (timing.queue, timing.prefill) == (before.queue, before.prefill)
    assert timing.decode is not None
    assert timing.decode > 1000.0, "decoding includes the pause, as the client saw it"


def test_times_outlast_an_engine_that_is_lost_while_it_replays() -> None:
    """It tells of progress but of no token; what the one before told must not be forgotten."""
    life = Life([(list(range(30)), GREEDY)])
    core, channel = life.engine(life.first)
    life.run(core, channel, lambda: len(life.generations[0].output) >= 4)
    before = life.generations[0].received.progress()
    for _ in range(2):
        life.live.lose_engine(None)
        core, channel = life.engine(life.live.resume())
        core.turn()
        life.deliver(channel)
        assert life.generations[0].received.progress() == before
    life.run(core, channel, lambda: not len(life.live))
    timing = life.answers()[0].timing
    assert timing is not None
    assert (timing.queue, timing.prefill) == (before.timing.queue, before.timing.prefill)


def test_cached_tokens_are_those_of_the_first_beginning() -> None:
    """A second engine that is cold, or warm by chance, does not change the bill."""
    life = Life([(SHARED, GREEDY), ([*SHARED, 7], GREEDY)])
    core, channel = life.engine(life.first)
    life.run(core, channel, lambda: len(life.generations[1].output) >= 1)
    assert life.generations[1].received.progress().cached == 24
    life.live.lose_engine(None)
    messages = life.live.resume()
    core, channel = life.engine(messages[1:])  # the first one was aborted meanwhile
    life.live.remove(0)
    life.run(core, channel, lambda: not len(life.live))
    update = life.generations[1].take()
    assert update is not None
    assert update.cached == 24


def test_f03_the_note_tells_the_poison_from_who_waits_for_a_slot() -> None:
    life = Life([([n], GREEDY) for n in range(6)])
    core, _ = life.engine(life.first)
    core._runner = Mortal(toy_info())
    with pytest.raises(SystemError):
        core.turn()
    assert life.note is not None
    assert life.note.request_ids == [0, 1, 2, 3], "four slots"
    assert life.note.tokens == 4


class Mortal(FakeRunner):
    def start(self, *_: Any) -> Any:
        raise SystemError


def test_resumed_twice_it_still_says_everything_once() -> None:
    prompt, params = list(range(30)), ECHO
    life = Life([(prompt, params)])
    core, channel = life.engine(life.first)
    for lost_at in (3, 5, 7):  # in the prompt, in the prompt again but further, in the output
        for _ in range(lost_at):
            core.turn()
        life.deliver(channel)
        life.live.lose_engine(None)
        core, channel = life.engine(life.live.resume())
    life.run(core, channel, lambda: not len(life.live))
    (update,) = life.answers()
    assert update.tokens == toy_generate(prompt, 4)
    assert [entry.token_id for entry in update.logprobs] == update.tokens
    entries = update.prompt_logprobs
    assert [None if e is None else e.token_id for e in entries] == [None, *prompt[1:]]
