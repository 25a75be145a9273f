"""Requests at the desk: admitted, told, aborted, carried to another engine, failed."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence

import pytest

from engine.admission import AdmissionQueue
from engine.client import Generation, Job
from engine.errors import EngineUnavailableError, PoisonError, QueueFullError, RequestError
from engine.live_requests import LiveRequests
from engine.messages import Abort, Add, RequestUpdate
from engine.poison import PoisonList
from engine.request import SamplingParams
from engine.request_desk import RequestDesk
from engine.running_child import RunningChild
from engine.starter import ReadyChild
from engine.supervision import SupervisionPolicy
from tests.engine.fake_child import FakeChild
from tests.engine.fake_clock import FakeClock
from tests.engine.toy_info import toy_info

MAX_REQUESTS, MAX_TOKENS = 6, 100
ECHO = SamplingParams(prompt_logprobs=0)


class Bench:
    """A desk before a child that only listens."""

    def __init__(self, *, prefix_caching: bool = True) -> None:
        clock = FakeClock(50.0)
        self.child = FakeChild()
        self.place = RunningChild(SupervisionPolicy(), clock)
        self.queue = AdmissionQueue(
            clock, max_requests=MAX_REQUESTS, max_prefill_tokens=MAX_TOKENS, small_tokens=4
        )
        self.desk = RequestDesk(
            self.queue,
            LiveRequests(max_resumes=1),
            PoisonList(60.0, clock),
            self.place,
            clock,
            prefix_caching=prefix_caching,
        )
        self.replace_child()

    def replace_child(self) -> None:
        """Another engine is ready."""
        asyncio.run(self.place.drop())
        self.child = FakeChild()
        info = toy_info()
        self.place.put(ReadyChild(self.child, info))
        self.desk.know_model(info)

    def submit(self, *prompts: Sequence[int], params: SamplingParams = ECHO) -> list[Generation]:
        return self.desk.submit_all([Job(prompt, params) for prompt in prompts])

    def crash(self, *in_step: Generation) -> int:
        """The engine is lost while it computes these; crashes of one that is guilty."""
        guilty = self.desk.lose_engine([generation.request_id for generation in in_step])
        self.replace_child()
        return guilty

    @property
    def is_idle(self) -> bool:
        async def wait() -> bool:
            try:
                async with asyncio.timeout(0):
                    await self.desk.wait_idle()
            except TimeoutError:
                return False
            return True

        return asyncio.run(wait())


def test_a_call_reaches_the_engine_in_order_and_with_its_time() -> None:
    bench = Bench()
    first, second = bench.submit([1, 2], [3])
    adds = [message for message in bench.child.sent if isinstance(message, Add)]
    assert [array("i", add.prompt).tolist() for add in adds] == [[1, 2], [3]]
    assert [add.request_id for add in adds] == [first.request_id, second.request_id]
    assert {add.arrival for add in adds} == {50.0}
    assert (bench.queue.waiting, bench.queue.backlog) == (2, 3)


@pytest.mark.parametrize(
    ("prompts", "error"),
    [
        pytest.param([[7], [2**31]], RequestError, id="a token id too large"),
        pytest.param([[7]] * MAX_REQUESTS, QueueFullError, id="too many requests"),
        pytest.param([[7], [7] * MAX_TOKENS], QueueFullError, id="too many tokens"),
    ],
)
def test_of_a_call_that_is_refused_nothing_is_left(
    prompts: list[list[int]], error: type[Exception]
) -> None:
    bench = Bench()
    bench.submit([1])
    sent = list(bench.child.sent)
    with pytest.raises(error):
        bench.submit(*prompts)
    assert bench.child.sent == sent
    assert (bench.queue.waiting, bench.queue.backlog) == (1, 1)


@pytest.mark.parametrize(
    ("caching", "params", "backlog"),
    [(True, SamplingParams(), 10 + 2), (True, ECHO, 20), (False, SamplingParams(), 20)],
    ids=["shared", "echo", "no prefix cache"],
)
def test_equal_prompts_are_charged_as_they_will_be_computed(
    caching: bool, params: SamplingParams, backlog: int
) -> None:
    bench = Bench(prefix_caching=caching)
    prompt = list(range(10))
    bench.submit(prompt, prompt, params=params)
    assert bench.queue.backlog == backlog


def test_a_request_is_told_its_news_and_leaves_with_the_last() -> None:
    bench = Bench()
    assert bench.is_idle
    (generation,) = bench.submit([1, 2, 3])
    bench.desk.take(RequestUpdate(request_id=generation.request_id, tokens=[9], prefilled=3))
    assert (generation.output, bench.queue.waiting, bench.is_idle) == ([9], 0, False)
    last = RequestUpdate(request_id=generation.request_id, tokens=[8], finish_reason="stop")
    bench.desk.take(last)
    bench.desk.take(last)
    assert (generation.output, generation.finished, bench.is_idle) == ([9, 8], True, True)


def test_an_abort_reaches_the_engine_once_and_frees_the_queue() -> None:
    bench = Bench()
    (generation,) = bench.submit([1, 2, 3])
    generation.abort()
    generation.abort()
    assert bench.child.sent[1:] == [Abort([generation.request_id])]
    assert (bench.queue.waiting, bench.queue.backlog, bench.is_idle) == (0, 0, True)


def test_another_engine_gets_what_is_live_and_was_told() -> None:
    bench = Bench()
    kept, ended = bench.submit([1, 2], [3])
    bench.desk.take(RequestUpdate(request_id=kept.request_id, tokens=[9], prefilled=2))
    bench.desk.take(RequestUpdate(request_id=ended.request_id, finish_reason="stop"))
    assert bench.crash() == 0
    assert bench.queue.waiting == 1, "all that is live waits again"
    assert bench.desk.resume() == 1
    (add,) = bench.child.sent
    assert isinstance(add, Add)
    assert array("i", add.output).tolist() == [9]


def test_F03_the_request_that_ends_engines_fails_alone_and_is_refused() -> None:
    bench = Bench()
    guilty, other = bench.submit([1, 2], [3])
    bench.desk.take(RequestUpdate(request_id=other.request_id, tokens=[9], prefilled=1))
    assert bench.crash(guilty) == 0
    assert bench.desk.most_crashes == 1
    assert bench.desk.resume() == 2
    assert bench.crash(guilty) == 2
    assert (guilty.finished, other.finished) == (True, False)
    update = guilty.take()
    assert update is not None
    assert update.finish_reason == "error"
    with pytest.raises(PoisonError):
        bench.submit([4], [1, 2])
    assert bench.desk.resume() == 1


def test_without_an_engine_all_that_is_live_fails() -> None:
    bench = Bench()
    generations = bench.submit([1], [2])
    bench.desk.fail_all("the engine is dead")
    for generation in generations:
        with pytest.raises(EngineUnavailableError, match="dead"):
            generation.take()
    assert (bench.queue.waiting, bench.queue.backlog, bench.is_idle) == (0, 0, True)


def test_a_held_call_counts_while_it_is_tokenised() -> None:
    bench = Bench()
    with bench.desk.hold(MAX_REQUESTS, 1):
        assert bench.queue.waiting == MAX_REQUESTS
        with pytest.raises(QueueFullError):
            bench.submit([1])
    bench.submit([1])
