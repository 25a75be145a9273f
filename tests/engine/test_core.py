"""The loop in process, around the toy model: what goes in, what comes out, what stays behind."""

from __future__ import annotations

import pytest

from engine.messages import Attended, Shutdown
from tests.engine.core_bench import Bench, random_prompts
from tests.engine.fake_runner import (
    toy_generate,
    toy_next,
)

pytestmark = pytest.mark.usefixtures("look_ahead")  # all of this holds both ways


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


def test_a_resumed_request_goes_on_as_if_nothing_had_happened() -> None:
    prompt = [3, 1, 4, 1, 5]
    whole = toy_generate(prompt, 20)
    bench = Bench(max_batch_tokens=4)
    bench.add(1, prompt, output=whole[:13], max_tokens=20)
    bench.until_idle()
    assert bench.tokens(1) == whole[13:]
    assert bench.last(1).finish_reason == "length"


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
