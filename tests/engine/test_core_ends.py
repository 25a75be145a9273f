"""What ends a request in the loop: a stop token, a limit, an abort, a deadline; nothing is left."""

from __future__ import annotations

from typing import Any

import pytest

from engine.messages import Abort
from engine.step import Sample
from tests.engine.core_bench import Bench
from tests.engine.fake_runner import (
    EOS,
    FakeRunner,
    toy_generate,
)

pytestmark = pytest.mark.usefixtures("look_ahead")  # all of this holds both ways


def test_stop_ids_end_a_request_and_are_reported() -> None:
    prompt = [1, 2, 4]
    first, second, third = toy_generate(prompt, 3)
    assert third not in (first, second)
    bench = Bench()
    bench.add(1, prompt, max_tokens=10, stop_token_ids=(third,))
    bench.until_idle()
    assert bench.tokens(1) == toy_generate(prompt, 3)
    assert bench.last(1).finish_reason == "stop"
    assert bench.last(1).stop_token == third


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_end_of_sequence_stops_unless_ignored(ignore_eos: bool) -> None:
    class Ender(FakeRunner):
        def _sample(self, *_: Any) -> Sample:
            return Sample(EOS)

    bench = Bench()
    runner = Ender(bench.info)
    bench.core = bench.core_of(runner)
    bench.add(1, [1], max_tokens=4, ignore_eos=ignore_eos)
    bench.until_idle()
    assert bench.tokens(1) == [EOS] * (4 if ignore_eos else 1)
    assert bench.last(1).finish_reason == ("length" if ignore_eos else "stop")


def test_the_context_limit_ends_with_length() -> None:
    bench = Bench()
    limit = bench.info.max_model_len
    bench.add(1, [1] * (limit - 3), max_tokens=50)
    bench.until_idle()
    assert len(bench.tokens(1)) == 3
    assert bench.last(1).finish_reason == "length"


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 9])
def test_abort_at_any_point_frees_everything(turns: int) -> None:
    bench = Bench(max_batch_tokens=8)
    bench.add(1, [4] * 20, max_tokens=30)
    bench.add(2, [5] * 5, max_tokens=4)
    bench.turns(turns)
    bench.channel.inbox.append(Abort([1, 1, 99]))
    bench.until_idle()
    assert bench.tokens(2) == toy_generate([5] * 5, 4)
    assert all(update.finish_reason is None for update in bench.updates(1))
    stats = bench.channel.reports[-1].stats
    assert (stats.full_used, stats.window_used, stats.prefill_remaining) == (0, 0, 0)
    bench.add(3, [4] * 20, max_tokens=5)
    bench.until_idle()
    assert bench.tokens(3) == toy_generate([4] * 20, 5)


@pytest.mark.parametrize("chunks", [1, 2, 4], ids=["in prefill", "late prefill", "in decode"])
def test_B83_the_engine_drops_a_running_request_at_its_deadline(chunks: int) -> None:
    """Without an abort: a front end that is late or gone leaves no orphan."""
    bench = Bench(max_batch_tokens=8)
    bench.add(1, [4] * 20, max_tokens=90, deadline=bench.now + 3 * chunks)
    bench.add(2, [5] * 5, max_tokens=20)
    bench.until_idle()
    assert bench.last(1).finish_reason == "deadline"
    assert 0 < bench.updates(1)[-1].prefilled <= 20
    assert len(bench.tokens(1)) < 90
    assert bench.tokens(2) == toy_generate([5] * 5, 20)
    stats = bench.channel.reports[-1].stats
    assert (stats.full_used, stats.window_used, stats.prefill_remaining) == (0, 0, 0)
    assert sorted(bench.runner.forgotten) == [1, 2]


def test_B83_the_engine_drops_a_queued_request_at_its_deadline() -> None:
    bench = Bench(full_pages=28, window_pages=28)
    bench.add(1, [4] * 60, max_tokens=40)
    bench.add(2, [5] * 60, max_tokens=40, deadline=bench.now + 9)
    bench.until_idle()
    assert bench.last(2).finish_reason == "deadline"
    timing = bench.last(2).timing
    assert timing is not None
    assert timing.prefill is None, "it never ran"
    assert bench.tokens(1) == toy_generate([4] * 60, 40)


def test_B83_a_deadline_that_is_over_at_arrival_costs_no_step() -> None:
    bench = Bench()
    bench.add(1, [4] * 60, max_tokens=40, deadline=bench.now)
    bench.turns(1)
    assert bench.last(1).finish_reason == "deadline"
    assert not bench.runner.steps
