"""The loop in process, around the toy model: what goes in, what comes out, what stays behind."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from typing import Any

import pytest

from engine.core import EngineCore
from engine.messages import Abort, Add, Attended, Shutdown
from engine.messages import RequestUpdate as Update
from engine.request import Request, SamplingParams
from engine.step import Sample
from tests.engine.fake_channel import FakeChannel
from tests.engine.fake_runner import (
    EOS,
    NOT_FINITE,
    RAISE,
    FakeRunner,
    toy_generate,
    toy_info,
    toy_next,
    toy_scheduler,
)


class Bench:
    """An EngineCore with everything around it faked but the scheduler."""

    look_ahead = False

    def __init__(self, *, clock_start: float = 100.0, **options: Any) -> None:
        info_options = {k: options.pop(k) for k in ("full_pages", "window_pages") if k in options}
        self.now = clock_start
        self.info = toy_info(**info_options)
        self.channel = FakeChannel()
        self.runner = FakeRunner(self.info)
        self.scheduler = toy_scheduler(self.info, **options)
        self.core = self.core_of(self.runner)

    def core_of(self, runner: FakeRunner) -> EngineCore:
        channel, ahead = self.channel, self.look_ahead
        return EngineCore(self.scheduler, runner, channel, clock=self.tick, look_ahead=ahead)

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def add(
        self,
        request_id: int,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        deadline: float | None = None,
        **params: Any,
    ) -> None:
        self.channel.inbox.append(
            Add(
                request_id=request_id,
                params=SamplingParams(**{"temperature": 0.0, **params}),
                prompt=array("i", prompt).tobytes(),
                output=array("i", output).tobytes(),
                arrival=self.now,
                deadline=deadline,
            )
        )

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.core.turn()

    def until_idle(self, limit: int = 5000) -> None:
        """Turn until the loop waits for messages; then nothing may be left in use."""
        for _ in range(limit):
            self.core.turn()
            if not self.channel.inbox and self.channel.reports[-1].stats.running == 0:
                stats = self.channel.reports[-1].stats
                if stats.waiting == 0:
                    break
        else:
            pytest.fail(f"still busy after {limit} turns")
        self.core.turn()
        assert self.channel.timeouts[-1] > 0, "an idle loop blocks on its socket"
        self.scheduler.check_integrity()

    def updates(self, request_id: int) -> list[Update]:
        return [u for r in self.channel.reports for u in r.updates if u.request_id == request_id]

    def tokens(self, request_id: int) -> list[int]:
        return [token for update in self.updates(request_id) for token in update.tokens]

    def last(self, request_id: int) -> Update:
        """The one update with a finish reason, which must be the last one."""
        updates = self.updates(request_id)
        assert [u.finish_reason is not None for u in updates] == [False] * (len(updates) - 1) + [
            True
        ]
        return updates[-1]


@pytest.fixture(autouse=True, params=[False, True], ids=["step by step", "ahead"])
def look_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """All of this holds whether or not steps are started before the one before is read."""
    monkeypatch.setattr(Bench, "look_ahead", request.param)
    return bool(request.param)


def random_prompts(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    source = random.Random(seed)
    shared = [source.randrange(EOS) for _ in range(longest)]
    prompts = []
    for _ in range(count):
        keep = source.randrange(longest // 2)
        own = [source.randrange(EOS) for _ in range(source.randrange(1, longest // 2))]
        prompts.append(shared[:keep] + own)
    return prompts


@pytest.mark.parametrize("max_batch_tokens", [4, 7, 64])
@pytest.mark.parametrize("pages", [20, 30, 200], ids=lambda n: f"{n} pages")
def test_tokens_do_not_depend_on_batch_chunks_prefix_hits_or_preemption(
    max_batch_tokens: int, pages: int
) -> None:
    bench = Bench(max_batch_tokens=max_batch_tokens, full_pages=pages, window_pages=pages)
    prompts = random_prompts(16, seed=pages)
    for request_id, prompt in enumerate(prompts):
        bench.add(request_id, prompt, max_tokens=25)
        bench.turns(request_id % 3)
    bench.until_idle()
    for request_id, prompt in enumerate(prompts):
        assert bench.tokens(request_id) == toy_generate(prompt, 25)
        assert bench.last(request_id).finish_reason == "length"
    stats = bench.channel.reports[-1].stats
    assert stats.generated_tokens == 16 * 25
    assert stats.prefix_hit_tokens > 0
    assert (stats.preemptions > 0) == (pages < 200), "the small pools are there to preempt"
    assert sorted(bench.runner.forgotten) == list(range(16))


def test_progress_is_told_with_each_chunk() -> None:
    bench = Bench(max_batch_tokens=8)
    bench.add(1, [3] * 21, max_tokens=2)
    bench.until_idle()
    assert [u.prefilled for u in bench.updates(1)] == [8, 16, 21, 21]
    assert [u.tokens for u in bench.updates(1)[:2]] == [[], []]


def test_cached_prompt_tokens_are_reported() -> None:
    bench = Bench()
    prompt = list(range(30))
    bench.add(1, prompt, max_tokens=1)
    bench.until_idle()
    bench.add(2, prompt, max_tokens=1)
    bench.until_idle()
    assert bench.last(1).cached == 0
    assert bench.last(2).cached == 28  # whole pages of 4, and one token must be computed
    assert bench.tokens(2) == bench.tokens(1)


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


def test_max_tokens_zero_yields_prompt_logprobs_and_no_token() -> None:
    bench = Bench(max_batch_tokens=8)
    bench.add(1, list(range(20)), max_tokens=0, prompt_logprobs=0)
    bench.until_idle()
    assert bench.tokens(1) == []
    assert bench.last(1).finish_reason == "length"
    entries = [entry for update in bench.updates(1) for entry in update.prompt_logprobs]
    assert entries[0] is None
    assert [entry.token_id for entry in entries[1:] if entry is not None] == list(range(1, 20))
    assert bench.channel.reports[-1].stats.generated_tokens == 0


def test_prompt_logprobs_come_once_although_preemption_computes_them_again() -> None:
    bench = Bench(full_pages=20, window_pages=20, max_batch_tokens=8)
    for request_id in range(4):
        bench.add(request_id, [request_id] * 24, max_tokens=25, prompt_logprobs=0)
    bench.until_idle()
    assert bench.channel.reports[-1].stats.preemptions > 0
    for request_id in range(4):
        entries = [e for update in bench.updates(request_id) for e in update.prompt_logprobs]
        assert [None if e is None else e.logprob for e in entries] == [
            None,
            *(-float(position) for position in range(1, 24)),
        ]


def test_logprobs_come_with_their_tokens() -> None:
    bench = Bench()
    bench.add(1, [1], max_tokens=3, logprobs=0)
    bench.until_idle()
    reported = [entry.token_id for update in bench.updates(1) for entry in update.logprobs]
    assert reported == bench.tokens(1)


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


def test_seconds_are_told_by_what_a_step_computed(look_ahead: bool) -> None:
    """From the start of a step, or from the results of the one before if it was started earlier.

    The clock goes on by one whenever it is looked at, so a start in between shows.
    """
    bench = Bench(max_batch_tokens=8)
    bench.add(1, [1] * 16, max_tokens=4)  # two prefill steps, then three decode steps alone
    bench.turns(4)
    bench.add(2, [2] * 15, max_tokens=2)  # 7 tokens beside the last of them, unless it is under way
    bench.until_idle()
    stats = bench.channel.reports[-1].stats
    steps = stats.prefill_steps, stats.mixed_steps, stats.decode_steps
    seconds = stats.prefill_seconds, stats.mixed_seconds, stats.decode_seconds
    assert steps == ((4, 0, 4) if look_ahead else (3, 1, 3))
    assert seconds == ((4.0, 0.0, 2 + 2 + 1 + 1) if look_ahead else (3.0, 1.0, 3.0))
    assert stats.step == sum(steps)
    assert stats.step_seconds == 1.0


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


def test_a_resumed_request_goes_on_as_if_nothing_had_happened() -> None:
    prompt = [3, 1, 4, 1, 5]
    whole = toy_generate(prompt, 20)
    bench = Bench(max_batch_tokens=4)
    bench.add(1, prompt, output=whole[:13], max_tokens=20)
    bench.until_idle()
    assert bench.tokens(1) == whole[13:]
    assert bench.last(1).finish_reason == "length"


def test_v34_what_one_request_left_in_a_slot_does_not_reach_the_next() -> None:
    bench = Bench(full_pages=12, window_pages=12)
    for round_ in range(6):
        canary = [11 + round_] * (5 + 3 * round_)
        bench.add(round_, canary, max_tokens=6)
        bench.until_idle()
        assert bench.tokens(round_) == toy_generate(canary, 6)


@pytest.mark.parametrize("start", [100.0, 100.0 - 86400, 100.0 + 86400])
def test_f18_timings_are_differences_of_the_injected_clock(start: float) -> None:
    bench = Bench(clock_start=start, max_batch_tokens=8)
    bench.add(1, [1] * 20, max_tokens=4)
    bench.until_idle()
    timing = bench.last(1).timing
    assert timing is not None
    assert timing.queue is not None
    assert timing.prefill is not None
    assert timing.decode is not None
    assert timing.queue >= 0
    assert timing.prefill > 0
    total = timing.queue + timing.prefill + timing.decode
    assert total == pytest.approx(bench.now - start, abs=6), "within the idle turns at the end"


def test_the_token_budget_is_summed_over_decode_steps() -> None:
    bench = Bench()
    bench.add(1, [1] * 9, max_tokens=4)
    bench.until_idle()
    assert bench.last(1).attended == Attended(pairs=3, tokens=5 + 5 + 6, fraction=1.5)
    assert bench.channel.reports[-1].stats.layer_attended_fraction == {0: 0.5}


def test_shutdown_ends_the_loop() -> None:
    bench = Bench()
    bench.add(1, [1], max_tokens=100)
    bench.channel.inbox.append(Shutdown())
    bench.core.run()


def test_the_toy_model_reads_every_token() -> None:
    assert len({toy_next([1, 2, 3]), toy_next([1, 3, 2]), toy_next([0, 2, 3])}) == 3
