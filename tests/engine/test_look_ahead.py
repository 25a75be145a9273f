"""Steps that are started before the one before is read: when they are, and what must not change.

That everything else holds with them too is asserted where it is tested (`test_core` and the files
beside it, `test_decode_step`, `tests/simulation`).
"""

from __future__ import annotations

import pytest

from engine.kv_pools import KvPools
from engine.messages import Abort
from engine.request import Request
from tests.engine.ahead_bench import AheadBench
from tests.engine.core_bench import Bench
from tests.engine.fake_runner import FakeRunner, toy_generate


def used(bench: Bench) -> tuple[int, int]:
    return bench.scheduler.pools.full.used, bench.scheduler.pools.window.used


def test_all_but_the_first_step_of_rows_are_started_ahead() -> None:
    bench = AheadBench()
    bench.add(1, [1, 2, 3], max_tokens=9)
    bench.until_idle()
    assert bench.tokens(1) == toy_generate([1, 2, 3], 9)
    assert len(bench.runner.steps) == 9, "nothing is computed past the end, which is known"
    assert len(bench.ahead) == 9 - 2, "but for the prompt, and the first row behind it"


def test_only_devices_that_overlap_are_given_steps_ahead() -> None:
    """Elsewhere a token would be told only after the next one was computed."""
    for overlaps in (False, True):
        bench = AheadBench()
        bench.look_ahead = None  # type: ignore[assignment]  # what the loop does by itself
        bench.run_with(FakeRunner(bench.info, overlaps=overlaps))
        bench.add(1, [1, 2, 3], max_tokens=9)
        bench.until_idle()
        assert bool(bench.ahead) == overlaps


def test_a_row_that_ends_by_its_length_has_none_in_the_next_step() -> None:
    bench = AheadBench()
    for request_id, count in ((1, 5), (2, 9), (3, 7)):
        bench.add(request_id, [request_id], max_tokens=count)
    bench.until_idle()
    assert [len(batch.spans) for batch in bench.ahead] == [3, 3, 3, 2, 2, 1, 1]
    for request_id, count in ((1, 5), (2, 9), (3, 7)):
        assert bench.tokens(request_id) == toy_generate([request_id], count)


def test_the_row_of_a_request_that_ended_counts_for_nothing() -> None:
    """The stop id shows when the next step is under way: accounts are those of step by step."""
    answer = toy_generate([1, 2, 4], 9)
    totals = []
    for look_ahead in (False, True):
        bench = AheadBench()
        bench.look_ahead = look_ahead
        bench.run_with(FakeRunner(bench.info))
        bench.add(1, [1, 2, 4], max_tokens=50, stop_token_ids=(answer[6],))
        bench.add(2, [5], max_tokens=12)
        bench.until_idle()
        stats = bench.channel.reports[-1].stats
        sums = stats.generated_tokens, stats.attended_tokens, stats.read_dense_bytes
        totals.append((sums, bench.last(1).attended, bench.last(2).attended))
        assert bench.tokens(1) == answer[: answer.index(answer[6]) + 1]
        assert bench.last(1).finish_reason == "stop"
        assert bench.tokens(2) == toy_generate([5], 12)
    assert totals[0] == totals[1]
    rows = sum(len(batch.spans) for batch in bench.ahead)
    assert rows > stats.decode_steps, "one row too many was computed"


def test_the_end_is_told_at_once_and_pages_go_back_when_nothing_writes_to_them() -> None:
    answer = toy_generate([1, 2, 4], 7)
    bench = AheadBench()
    bench.add(1, [1, 2, 4], max_tokens=50, stop_token_ids=(answer[6],))

    def look() -> None:
        assert min(used(bench)) > 0, "a step with a row of it is under way"
        assert bench.runner.forgotten == []
        bench.turns(1)
        assert used(bench) == (0, 0)
        assert bench.runner.forgotten == [1]
        assert len(bench.runner.steps) == 8, "none is started behind such a step"

    bench.watch(1, look)
    bench.until_idle()
    assert bench.channel.reports[-1].stats.decode_steps == 6


@pytest.mark.parametrize("turns", range(2, 9))
def test_a_request_that_leaves_while_its_row_is_under_way(turns: int) -> None:
    bench = AheadBench()
    for request_id in (1, 2):
        bench.add(request_id, [request_id] * 3, max_tokens=20)
    bench.turns(turns)
    told = len(bench.tokens(1))
    bench.channel.inbox.append(Abort([1]))
    bench.turns(1)
    assert len(bench.tokens(1)) == told, "what was under way is not told"
    assert bench.runner.forgotten == [1], "its step was read in that turn"
    bench.add(3, [3] * 9, max_tokens=9)
    bench.until_idle()
    assert bench.tokens(2) == toy_generate([2] * 3, 20)
    assert bench.tokens(3) == toy_generate([3] * 9, 9)


def test_who_waits_for_a_slot_is_not_passed_by() -> None:
    """With a free slot or a row that ends now, the results are read first. Behind rows that go on,
    the queue waits anyway."""
    bench = AheadBench()
    for request_id in range(5):
        bench.add(request_id, [request_id], max_tokens=8 + 2 * request_id)
    bench.turns(2)
    assert bench.scheduler.queues.num_waiting == 1
    before = len(bench.ahead)
    bench.turns(3)
    assert len(bench.ahead) > before, "four slots are taken, and all of the rows go on"
    while bench.scheduler.queues.num_waiting:
        bench.turns(1)
    place = next(i for i, s in enumerate(bench.runner.steps) if 4 in s.request_ids)
    last = max(i for i, s in enumerate(bench.runner.steps) if 0 in s.request_ids)
    assert place == last + 1, "in the first step after the one that made room"
    bench.until_idle()
    assert bench.tokens(4) == toy_generate([4], 16)


def test_a_new_request_waits_for_no_step_that_was_not_started() -> None:
    bench = AheadBench()
    bench.add(1, [1], max_tokens=30)
    bench.turns(4)
    started = len(bench.runner.steps)
    bench.add(2, [2], max_tokens=3)
    bench.turns(2)
    assert bench.runner.steps[started].request_ids == [1, 2]


def test_penalties_are_computed_step_by_step() -> None:
    bench = AheadBench()
    bench.add(1, [1, 2], max_tokens=9, presence_penalty=0.5)
    bench.add(2, [3], max_tokens=14)
    bench.until_idle()
    assert all(batch.request_ids == [2] for batch in bench.ahead)
    assert len(bench.ahead) == 14 - 9 - 1


def test_no_page_is_taken_from_anybody_for_a_step_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lacking is found by preemption, which comes with results only."""
    bench = AheadBench(full_pages=20, window_pages=20)
    for request_id in range(4):
        bench.add(request_id, [request_id] * 12, max_tokens=25)
    under_way = False
    real = KvPools.release

    def release(pools: KvPools, request: Request) -> None:
        flight = bench.core._flight
        assert flight is None or not flight.holds(request.request_id)
        real(pools, request)

    monkeypatch.setattr(KvPools, "release", release)
    for _ in range(200):
        bench.turns(1)
        under_way |= bench.core._flight is not None
    bench.until_idle()
    assert under_way
    assert bench.channel.reports[-1].stats.preemptions > 0
    for request_id in range(4):
        assert bench.tokens(request_id) == toy_generate([request_id] * 12, 25)
