"""Requests at fault in the loop: each is answered, none touches another, and what ends the loop."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.request import Request
from tests.engine.core_bench import Bench
from tests.engine.fake_runner import (
    NOT_FINITE,
    RAISE,
    toy_generate,
)

pytestmark = pytest.mark.usefixtures("look_ahead")  # all of this holds both ways

BAD_REQUESTS: dict[str, dict[str, Any]] = {
    "id past the logits": {"prompt": [1, 100]},
    "negative id": {"prompt": [1, -1]},
    "resumed with a bad id": {"prompt": [1], "output": [5000]},
    "bias past the logits": {"prompt": [1], "logit_bias": {100: 1.0}},
    "stop id past the logits": {"prompt": [1], "stop_token_ids": (100,)},
    "longer than the model": {"prompt": [1] * 128},
    "longer than the cache": {"prompt": [1], "max_tokens": 2**31},
    "no prompt": {"prompt": []},
    "resumed when it was done": {"prompt": [1], "output": [2] * 5},
    "resumed past its end": {"prompt": [1], "output": [2] * 9},
    "negative max_tokens": {"prompt": [1], "max_tokens": -1},
    "NaN temperature": {"prompt": [1], "temperature": math.nan},
    "negative temperature": {"prompt": [1], "temperature": -1.0},
    "infinite temperature": {"prompt": [1], "temperature": math.inf},
    "top_p 0": {"prompt": [1], "top_p": 0.0},
    "top_p NaN": {"prompt": [1], "top_p": math.nan},
    "negative top_k": {"prompt": [1], "top_k": -1},
    "min_p over 1": {"prompt": [1], "min_p": 1.5},
    "NaN bias": {"prompt": [1], "logit_bias": {3: math.nan}},
    "infinite bias": {"prompt": [1], "logit_bias": {3: math.inf}},
    "NaN penalty": {"prompt": [1], "frequency_penalty": math.nan},
    "repetition_penalty 0": {"prompt": [1], "repetition_penalty": 0.0},
    "tiny repetition_penalty": {"prompt": [1], "repetition_penalty": 1e-40},
    "negative logprobs": {"prompt": [1], "logprobs": -1},
    "negative prompt_logprobs": {"prompt": [1], "prompt_logprobs": -1},
    "attention_top_p over 1": {"prompt": [1], "attention_top_p": 1.1},
    "attention_top_p NaN": {"prompt": [1], "attention_top_p": math.nan},
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_v07_requests_at_fault_are_answered_and_touch_nobody(name: str) -> None:
    bench = Bench()
    bench.add(1, [1, 2], max_tokens=5)
    bench.add(2, **{"max_tokens": 5, **BAD_REQUESTS[name]})
    bench.until_idle()
    assert bench.last(2).finish_reason == "error"
    assert bench.tokens(2) == []
    assert bench.tokens(1) == toy_generate([1, 2], 5)


def test_V09_an_exception_while_a_request_is_taken_in_ends_it_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it is: a prompt that the scheduler stumbles over is no reason to end the loop."""
    bench = Bench()
    whole = bench.scheduler.add

    def stumble(request: Request) -> None:
        if 13 in request.prompt:
            raise ZeroDivisionError("nobody expected this")
        whole(request)

    monkeypatch.setattr(bench.scheduler, "add", stumble)
    bench.add(1, [1, 2], max_tokens=5)
    bench.add(2, [13], max_tokens=5)
    bench.until_idle()
    assert bench.last(2).finish_reason == "error"
    assert bench.tokens(1) == toy_generate([1, 2], 5)
    assert "ZeroDivisionError" in caplog.text, "the log tells where"


def test_a_request_that_comes_twice_is_computed_once() -> None:
    bench = Bench()
    bench.add(1, [1, 2], max_tokens=5)
    bench.turns(2)
    bench.add(1, [3], max_tokens=9)
    bench.until_idle()
    assert bench.tokens(1) == toy_generate([1, 2], 5)


def test_f07_a_row_that_is_not_finite_ends_alone_and_is_never_cached() -> None:
    bench = Bench(max_batch_tokens=16)
    poisoned = [7] * 10 + [NOT_FINITE] + [8] * 20
    bench.add(1, poisoned, max_tokens=5)
    bench.add(2, [9, 9], max_tokens=5)
    bench.until_idle()
    assert bench.last(1).finish_reason == "error"
    assert bench.tokens(1) == []
    assert bench.tokens(2) == toy_generate([9, 9], 5)
    bench.add(3, poisoned[:10] + [6] * 20, max_tokens=2)
    bench.until_idle()
    assert bench.last(3).cached == 0
    assert bench.tokens(3) == toy_generate(poisoned[:10] + [6] * 20, 2)


def test_F07_those_that_wait_for_a_prompt_that_fails_go_on_from_what_was_good() -> None:
    bench = Bench(max_batch_tokens=8)
    shared = [7] * 20
    bench.add(1, [*shared, NOT_FINITE, *[8] * 9], max_tokens=5)
    for request_id in (2, 3):
        bench.add(request_id, [*shared, request_id, 5], max_tokens=5)
    bench.until_idle()
    assert bench.last(1).finish_reason == "error"
    for request_id in (2, 3):
        assert bench.tokens(request_id) == toy_generate([*shared, request_id, 5], 5)
        assert bench.last(request_id).cached >= 16, "chunks before the failed one are shared"


def test_f08_an_exception_in_a_step_leaves_the_loop() -> None:
    bench = Bench()
    bench.add(1, [RAISE], max_tokens=1)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        bench.until_idle()


def test_v34_what_one_request_left_in_a_slot_does_not_reach_the_next() -> None:
    bench = Bench(full_pages=12, window_pages=12)
    for round_ in range(6):
        canary = [11 + round_] * (5 + 3 * round_)
        bench.add(round_, canary, max_tokens=6)
        bench.until_idle()
        assert bench.tokens(round_) == toy_generate(canary, 6)
