"""Bytes that decode steps read, against counts made head by head; and what a snapshot tells."""

from __future__ import annotations

import dataclasses

import pytest

from engine.batch import Batch, Rule, Span
from engine.load_snapshot import with_load
from engine.messages import Attended, Stats
from engine.model.config import ModelConfig
from engine.model.head_layout import model_heads
from engine.read_bytes import count_reads, read_bytes
from engine.request import Request, SamplingParams
from engine.step import StepResult
from tests.engine.head_map_model import make_model
from tests.engine.toy_info import toy_info, toy_scheduler

WINDOW, SINKS, INDEX_DIM, ITEM = 8, 2, 4, 2


def sparse_config() -> ModelConfig:
    """Two layers of four query heads on two KV heads: a head of each role, and a layer of none."""
    return make_model([[0], []], dim=16, window=WINDOW, sinks=SINKS, index_dim=INDEX_DIM, block=4)


def decode_span(stop: int, *, sample: bool = True, rule: Rule = "decode") -> Span:
    return Span(
        request_id=1,
        slot=0,
        start=stop - 1,
        tokens=[0],
        rule=rule,
        full_blocks=[],
        window_blocks=[],
        sample=sample,
    )


def read_by(config: ModelConfig, span: Span, attended: Attended | None) -> Stats:
    stats = Stats()
    result = StepResult(attended={} if attended is None else {1: attended})
    count_reads(stats, read_bytes(config, ITEM), Batch([span]), result)
    return stats


def test_a_row_that_selects_reads_what_was_attended_and_the_index() -> None:
    config = sparse_config()
    row = 2 * config.head_dim * ITEM  # a key and a value
    stats = read_by(config, decode_span(100), Attended(1, 30, 0.3))
    assert (stats.attended_tokens, stats.context_tokens) == (30, 100)
    assert stats.read_selected_bytes == 30 * row
    assert stats.read_index_bytes == 100 * INDEX_DIM * ITEM
    assert stats.read_whole_bytes == 0
    # Head 1 is local on the KV head that head 0 keeps whole; the other three KV heads are windowed.
    assert stats.read_window_bytes == 4 * (WINDOW + SINKS) * row
    assert stats.read_dense_bytes == 4 * 100 * row


def test_a_row_that_does_not_select_reads_all_of_the_full_heads() -> None:
    config = sparse_config()
    row = 2 * config.head_dim * ITEM
    stats = read_by(config, decode_span(6), None)
    assert (stats.attended_tokens, stats.context_tokens, stats.read_index_bytes) == (0, 0, 0)
    assert stats.read_whole_bytes == 6 * row
    assert stats.read_window_bytes == 4 * 6 * row, "the context is shorter than the window"


def test_a_dense_model_reads_what_a_dense_model_reads() -> None:
    config = dataclasses.replace(sparse_config(), sparse=None)
    stats = read_by(config, decode_span(50), None)
    assert stats.read_whole_bytes == stats.read_dense_bytes > 0
    assert stats.read_window_bytes == stats.read_index_bytes == stats.read_selected_bytes == 0
    assert all(not heads.local_on_full for heads in model_heads(config))


@pytest.mark.parametrize(
    "span",
    [decode_span(9, sample=False), decode_span(9, rule="prefill")],
    ids=["replayed", "prompt"],
)
def test_only_new_tokens_count(span: Span) -> None:
    assert read_by(sparse_config(), span, Attended(1, 3, 0.3)) == Stats()


def test_bytes_of_a_long_life_are_still_a_number_that_travels() -> None:
    """Sums of integers left the range of msgpack within a day of long contexts."""
    config, stats = sparse_config(), Stats(read_dense_bytes=float(2**64))
    span = decode_span(1_000_000)
    count_reads(stats, read_bytes(config, ITEM), Batch([span]), StepResult())
    assert stats.read_dense_bytes > 2**64


def request(number: int, prompt: int, arrival: float) -> Request:
    return Request(number, [number] * prompt, SamplingParams(max_tokens=4), arrival=arrival)


def test_a_snapshot_tells_who_waits_runs_and_is_read() -> None:
    """Three sequences for two slots, prompts longer than a step."""
    info = toy_info(max_num_seqs=2)
    scheduler = toy_scheduler(info, max_batch_tokens=16)
    requests = [request(1, 20, 5.0), request(2, 30, 6.0), request(3, 4, 7.0)]
    for one in requests:
        scheduler.add(one)
    before = with_load(Stats(step=3), scheduler, requests)
    assert (before.step, before.waiting, before.running) == (3, 3, 0)
    assert (before.oldest_waiting, before.oldest_running) == (5.0, None)
    assert before.oldest_prefill_total == 0, "nothing is under way"

    batch = scheduler.schedule()
    for one in requests[:2]:
        one.first_scheduled = 8.0 + one.request_id
    scheduler.update(batch, {})
    stats = with_load(Stats(), scheduler, requests)
    assert (stats.waiting, stats.running, stats.prefilling) == (1, 2, 2)
    assert (stats.oldest_waiting, stats.oldest_running) == (7.0, 5.0)
    assert stats.oldest_prefill_total == 20
    assert stats.oldest_prefill_done == requests[0].computed > 0
    assert stats.prefill_remaining == 54 - 16
    assert stats.full_used + stats.full_cached < stats.full_total
    available = scheduler.pools.full.available
    assert stats.free_tokens == available * info.block_tokens


def test_free_tokens_are_bounded_by_the_window_pool_when_no_window_fits() -> None:
    pools = toy_scheduler(toy_info(full_pages=64, window_pages=8)).pools
    live = pools.needed(1000)[1]  # pages of a window, however long its sequence is
    assert pools.free_tokens == 64 * 4
    held = [pools.window.allocate() for _ in range(8 - live + 1)]
    assert pools.free_tokens == (live - 1) * 4
    pools.window.release(held.pop())
    assert pools.free_tokens == 64 * 4
