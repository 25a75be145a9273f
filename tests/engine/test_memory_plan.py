"""The memory plan and the cache: bytes from first principles, and refusal where nothing fits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.memory_plan import MemoryPlan, plan_memory, recorded_step_bytes
from engine.model.config import ModelConfig
from engine.model.kv_bytes import page_bytes
from tests.engine.head_map_model import make_model

KV_HEAD = 2 * 8 * 4  # bytes of one token's K and V of one head of make_model, in float32


def make_plan(model: ModelConfig, cache_bytes: int, **settings: Any) -> MemoryPlan:
    defaults: dict[str, Any] = {"max_model_len": None, "max_num_seqs": 4, "max_batch_tokens": 64}
    return plan_memory(
        model,
        item_bytes=4,
        weight_bytes=1000,
        cache_bytes=cache_bytes,
        block_tokens=8,
        **(defaults | settings),
    )


def test_page_bytes_follow_the_head_layout() -> None:
    """2 layers of 2 KV heads: one full in layer 0, both in layer 1; 4 retrieval heads in all."""
    full, window = page_bytes(make_model([[0], [1, 2, 3]]), 4, 8)
    assert full == 8 * (3 * KV_HEAD + 4 * 4 * 4)
    assert window == 8 * KV_HEAD


def test_int8_index_keys_take_a_byte_a_dimension_and_a_scale() -> None:
    full, window = page_bytes(make_model([[0], [1, 2, 3]]), 4, 8, "int8")
    assert full == 8 * (3 * KV_HEAD + 4 * (4 + 2))
    assert window == 8 * KV_HEAD


def test_index_keys_per_kv_head_are_fewer() -> None:
    by_head, _ = page_bytes(make_model([[0, 1, 2]]), 2, 8)
    by_kv, _ = page_bytes(make_model([[0, 1, 2]], scope="kv_head"), 2, 8)
    assert by_head - by_kv == 8 * 4 * 2


def test_a_dense_model_has_one_pool_and_equal_costs() -> None:
    plan = make_plan(make_model(None, layers=2), 10**6)
    assert plan.window_pages == plan.window_page_bytes == 0
    assert plan.bytes_per_token == plan.bytes_per_token_dense == 4 * KV_HEAD


def test_a_model_without_retrieval_heads_has_no_full_pool() -> None:
    plan = make_plan(make_model([[]]), 10**6)
    assert plan.full_pages == plan.full_page_bytes == plan.bytes_per_token == 0
    assert plan.window_pages > 0
    assert plan.tokens is None


def test_the_decode_kernels_are_counted_and_shown() -> None:
    model = make_model([[0], [1, 2, 3]])
    plain, with_kernels = (make_plan(model, 10**6, decode_bytes=n) for n in (0, 3 * 2**20))
    assert with_kernels.total_bytes - plain.total_bytes == 3 * 2**20
    assert with_kernels.full_pages == plain.full_pages
    assert "decode kernels  3 MiB" in with_kernels.render()
    assert "decode kernels  none" in plain.render()


def test_recorded_steps_grow_with_rows_and_tables() -> None:
    model = make_model([[0]])
    one, more_rows, longer = (
        recorded_step_bytes(model, 4, rows, blocks) for rows, blocks in ((2, 9), (6, 9), (2, 10))
    )
    assert more_rows == 3 * one
    assert longer - one == 2 * 2 * 8, "a page id for each row in both pools"


def test_max_model_len_shrinks_to_what_fits_unless_it_was_asked_for() -> None:
    model = make_model(None)
    four_pages = 4 * 8 * 2 * KV_HEAD  # the null page and 3 more
    plan = make_plan(model, four_pages)
    assert (plan.full_pages, plan.max_model_len) == (3, 24)
    with pytest.raises(ConfigError, match="max_model_len 25"):
        make_plan(model, four_pages, max_model_len=25)


def test_max_model_len_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"300.*256"):
        make_plan(make_model([[0]]), 10**6, max_model_len=300)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError):
        make_plan(make_model([[0]]), 1)


@settings(deadline=None, max_examples=150)
@given(
    retrieval=st.sampled_from([[[]], [[0]], [[0, 3]], [[0, 1, 2, 3]], [[], [1]]]),
    budget=st.integers(1, 400_000),
    window=st.integers(1, 300),
    sinks=st.integers(0, 8),
    seqs=st.integers(1, 40),
    chunk=st.integers(40, 300),
)
def test_pools_stay_inside_the_budget_and_hold_one_maximal_request(
    retrieval: list[list[int]], budget: int, window: int, sinks: int, seqs: int, chunk: int
) -> None:
    model = make_model(retrieval, window=window, sinks=sinks)
    try:
        plan = make_plan(model, budget, max_num_seqs=seqs, max_batch_tokens=chunk)
    except ConfigError:
        return  # refused; that what fits is not refused is the test below
    assert plan.cache_bytes <= budget
    if plan.full_page_bytes:
        assert plan.full_pages * 8 >= plan.max_model_len
    if plan.window_page_bytes:
        assert plan.window_pages >= _most_live(plan.max_model_len, window, sinks, chunk)


def test_a_plan_that_fits_is_not_refused() -> None:
    model = make_model([[0]])
    full, window = page_bytes(model, 4, 8)
    # 256 tokens are 32 blocks; a chunk of 64 after a window of 11 and the sinks touch at most 12.
    plan = make_plan(model, 33 * full + 13 * window)
    assert plan.max_model_len == 256
    assert plan.full_pages >= 32
    assert plan.window_pages >= 11


def _most_live(length: int, window: int, sinks: int, chunk: int) -> int:
    """Counted, not computed: pages that any chunk of a prefill touches, whatever its start."""
    most = 0
    for start in range(length):
        stop = min(start + chunk, length)
        seen = {*range(min(sinks, stop)), *range(max(start - window + 1, 0), stop)}
        most = max(most, len({position // 8 for position in seen}))
    return most


def test_render_names_pools_and_both_costs() -> None:
    plan = make_plan(make_model([[0]]), 10**6)
    text = plan.render()
    assert f"{KV_HEAD + 16:,} B, dense {2 * KV_HEAD:,} B" in text
    for word in ("weights", "full pool", "window pool", "workspace", "256 tokens"):
        assert word in text
    parts = (plan.process_bytes, plan.weight_bytes, plan.cache_bytes, plan.workspace_bytes)
    assert plan.total_bytes == sum(parts)
