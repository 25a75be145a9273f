"""Head roles: every query head has one, and finds its KV head's row."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from engine.model.config import IndexScope, SparseAttentionConfig
from engine.model.head_layout import LayerHeads, layer_heads, model_heads
from tests.engine.head_map_model import make_model

KV_HEADS, GROUP = 3, 2
HEADS = KV_HEADS * GROUP


def with_heads(
    heads: tuple[int, ...], index_dim: int | None = 4, scope: IndexScope = "query_head"
) -> LayerHeads:
    top_p = tuple(head / 10 + 0.1 for head in heads)
    sparse = SparseAttentionConfig(
        retrieval_heads=(heads,), index_dim=index_dim, index_scope=scope, top_p=(top_p,)
    )
    dense = make_model(None, heads=HEADS, kv_heads=KV_HEADS)
    return layer_heads(dataclasses.replace(dense, sparse=sparse), 0)


@given(st.sets(st.integers(0, HEADS - 1)).map(lambda heads: tuple(sorted(heads))))
def test_roles_partition_the_heads_and_rows_lead_home(heads: tuple[int, ...]) -> None:
    got = with_heads(heads)
    assert got.retrieval == heads
    queries = (*got.retrieval, *got.local_on_full, *got.local_on_windowed)
    assert sorted(queries) == list(range(HEADS))
    assert sorted((*got.full_kv, *got.windowed_kv)) == list(range(KV_HEADS))
    pairs = [
        (got.retrieval, got.full_kv, got.retrieval_kv_row),
        (got.local_on_full, got.full_kv, got.local_on_full_kv_row),
        (got.local_on_windowed, got.windowed_kv, got.local_on_windowed_kv_row),
    ]
    for members, kv_heads, rows in pairs:
        assert [kv_heads[row] for row in rows] == [head // GROUP for head in members]


def test_index_rows_follow_the_scope() -> None:
    heads = (0, 1, 5)
    by_query = with_heads(heads)
    assert (by_query.index_row, by_query.index_rows) == ((0, 1, 2), 3)
    by_kv = with_heads(heads, scope="kv_head")
    assert (by_kv.full_kv, by_kv.index_row, by_kv.index_rows) == ((0, 2), (0, 0, 1), 2)
    assert by_query.top_p == by_kv.top_p == (0.1, 0.2, 0.6)


def test_without_indexer_or_without_retrieval_heads_there_are_no_index_rows() -> None:
    for heads in (with_heads((0, 3), index_dim=None), with_heads(())):
        assert not heads.has_indexer
        assert (heads.index_row, heads.top_p) == ((), ())


def test_a_dense_model_keeps_every_head() -> None:
    for heads in model_heads(make_model(None, heads=HEADS, kv_heads=KV_HEADS, layers=2)):
        assert heads.retrieval == tuple(range(HEADS))
        assert heads.full_kv == tuple(range(KV_HEADS))
        assert not heads.has_indexer
