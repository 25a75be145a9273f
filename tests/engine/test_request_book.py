"""What an engine keeps of its requests, and what it tells of them, one call at a time."""

from __future__ import annotations

from array import array

import pytest

from engine.batch import Batch, Span
from engine.errors import RequestError
from engine.messages import Add
from engine.request import SamplingParams
from engine.request_book import RequestBook
from engine.step import StepResult
from tests.engine.fake_runner import EOS
from tests.engine.toy_info import toy_info


def add(request_id: int, deadline: float | None = None, max_tokens: int = 3) -> Add:
    logprobs = None if max_tokens else 0
    return Add(
        request_id=request_id,
        params=SamplingParams(max_tokens=max_tokens, prompt_logprobs=logprobs),
        prompt=array("i", [1, 2]).tobytes(),
        arrival=5.0,
        deadline=deadline,
    )


def test_a_request_is_told_its_tokens_and_its_end() -> None:
    book = RequestBook(toy_info())
    request = book.enter(add(7))
    for token, finish in ((4, None), (EOS, "stop")):
        request.computed = request.total
        request.output.append(token)
        update = book.advance(7, StepResult(), token, now=9.0)
        assert (update.tokens, update.finish_reason) == ([token], finish)
    assert [update.tokens for update in book.take_updates()] == [[4], [EOS]]
    assert book.take_updates() == []


def test_an_echo_ends_with_its_prompt_and_without_a_token() -> None:
    book = RequestBook(toy_info())
    request = book.enter(add(7, max_tokens=0))
    request.computed = 1
    assert book.advance(7, StepResult(), None, now=9.0).finish_reason is None
    request.computed = 2
    update = book.advance(7, StepResult(), 4, now=9.0)
    assert (update.tokens, update.finish_reason) == ([], "length")


@pytest.mark.parametrize("entered", [False, True])
def test_a_refused_request_is_answered_and_gone(entered: bool) -> None:
    """Whether its message was at fault, or somebody stumbled over it afterwards."""
    book = RequestBook(toy_info())
    if entered:
        book.enter(add(7))
    else:
        with pytest.raises(RequestError):
            book.enter(add(7, max_tokens=-1))
    book.refuse(add(7), now=8.0)
    (update,) = book.take_updates()
    assert (update.request_id, update.finish_reason) == (7, "error")
    assert update.timing is not None
    assert update.timing.queue == 3.0
    assert 7 not in book


def test_those_are_overdue_whose_deadline_has_come() -> None:
    book = RequestBook(toy_info())
    book.enter(add(1))
    assert not book.has_deadlines
    for request_id, deadline in ((2, 10.0), (3, 11.0), (4, 12.0)):
        book.enter(add(request_id, deadline))
    assert book.has_deadlines
    assert book.overdue(11.0) == [2, 3]
    book.cut_off(2, "deadline", 11.0)
    book.remove(2)
    assert book.overdue(11.0) == [3]
    assert [update.finish_reason for update in book.take_updates()] == ["deadline"]


def test_a_request_leaves_the_queue_once() -> None:
    book = RequestBook(toy_info())
    request = book.enter(add(1))
    batch = Batch([Span(1, 0, 0, [1, 2], "prefill", [1], [1], True)])
    book.stamp(batch, 6.0)
    book.stamp(batch, 9.0)
    assert request.first_scheduled == 6.0
