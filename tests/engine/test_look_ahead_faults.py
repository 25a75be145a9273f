"""Steps that are started ahead: what fails in one, and a shutdown while one is under way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from engine.batch import Batch
from engine.errors import StepMemoryError
from engine.messages import Shutdown
from engine.request import Request
from engine.step import PendingStep, Sample, StepResult
from engine.step_note import StepNote
from tests.engine.ahead_bench import AheadBench
from tests.engine.fake_runner import FakeRunner, toy_generate


class Failing(FakeRunner):
    """Finds no memory for some steps, either at their start or when they are read."""

    def __init__(self, *args: Any, at: int, reading: bool) -> None:
        super().__init__(*args)
        self._at = at
        self._reading = reading
        self._calls = 0

    def start(self, batch: Batch, requests: Mapping[int, Request]) -> PendingStep:
        self._calls += 1
        fails = self._calls % self._at == 0
        if fails and not self._reading:
            self.compute(batch, requests)  # some of it, or all
            raise StepMemoryError("out of memory")
        step = super().start(batch, requests)
        return Unreadable(step) if fails else step


class Unreadable:
    def __init__(self, step: PendingStep) -> None:
        self._step = step

    def finish(self) -> StepResult:
        self._step.finish()
        raise StepMemoryError("out of memory")


@pytest.mark.parametrize("reading", [False, True], ids=["at its start", "when it is read"])
@pytest.mark.parametrize("at", [3, 4, 5])
def test_F05_a_step_ahead_that_finds_no_memory_is_computed_again(at: int, reading: bool) -> None:
    bench = AheadBench()
    bench.run_with(Failing(bench.info, at=at, reading=reading))
    stop = toy_generate([7] * 5, 9)[8]
    bench.add(1, [7] * 5, max_tokens=40, stop_token_ids=(stop,))
    for request_id in (2, 3):
        bench.add(request_id, [request_id] * 5, max_tokens=15 * request_id)
    bench.until_idle()
    assert bench.tokens(1) == toy_generate([7] * 5, 9)
    for request_id in (2, 3):
        assert bench.tokens(request_id) == toy_generate([request_id] * 5, 15 * request_id)
    assert bench.channel.reports[-1].stats.memory_retries > 2
    assert bench.ahead


def test_F07_a_row_that_fails_while_its_next_is_under_way_ends_alone() -> None:
    class Spoiled(FakeRunner):
        def _sample(self, span: Any, request: Request) -> Sample:
            if request.request_id == 1 and span.stop >= 9:
                return Sample(None)
            return super()._sample(span, request)

    bench = AheadBench()
    bench.run_with(Spoiled(bench.info))
    for request_id in (1, 2):
        bench.add(request_id, [request_id] * 5, max_tokens=20)
    bench.until_idle()
    assert bench.last(1).finish_reason == "error"
    assert bench.tokens(1) == toy_generate([1] * 5, 4)
    assert bench.tokens(2) == toy_generate([2] * 5, 20)


def test_f03_the_note_stays_while_a_step_is_under_way() -> None:
    """Between turns too: a process that is lost then is lost with these requests."""
    bench = AheadBench()
    notes: list[StepNote | None] = []
    bench.core._note = notes.append
    stop = toy_generate([1] * 3, 6)[5]
    bench.add(1, [1] * 3, max_tokens=40, stop_token_ids=(stop,))
    bench.add(2, [2] * 3, max_tokens=4)
    bench.until_idle()
    told = [None if note is None else note.request_ids for note in notes]
    both = [1, 2]
    assert told[:2] == [both, None], "the prompts"
    assert told[2:6] == [both, both, both, [1]], "row after row, the second one without a start"
    assert told[6:8] == [[1], [1]], "and a row for nothing"
    assert not any(told[8:])
    began = [note.began for note in notes if note is not None]
    assert began == sorted(began)


def test_a_shutdown_starts_nothing_more() -> None:
    bench = AheadBench()
    bench.add(1, [1], max_tokens=50)
    bench.turns(5)
    started = len(bench.runner.steps)
    bench.channel.inbox.append(Shutdown())
    bench.core.run()
    assert len(bench.runner.steps) == started
