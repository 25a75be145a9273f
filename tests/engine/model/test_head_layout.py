"""Head roles: every query head has one, and finds its KV head's row."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.model.config import IndexScope, ModelConfig, RopeConfig, SparseAttentionConfig
from engine.model.head_layout import LayerHeads, layer_heads, model_heads

KV_HEADS, GROUP = 3, 2
HEADS = KV_HEADS * GROUP


def model(sparse: SparseAttentionConfig | None, layers: int = 1) -> ModelConfig:
    return ModelConfig(
        family="qwen3",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=layers,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=4,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        qk_norm=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        rope=RopeConfig(theta=1e4),
        sparse=sparse,
    )


def with_heads(
    heads: tuple[int, ...], index_dim: int | None = 4, scope: IndexScope = "query_head"
) -> LayerHeads:
    top_p = tuple(head / 10 + 0.1 for head in heads)
    sparse = SparseAttentionConfig(
        retrieval_heads=(heads,), index_dim=index_dim, index_scope=scope, top_p=(top_p,)
    )
    return layer_heads(model(sparse), 0)


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
    for heads in model_heads(model(None, layers=2)):
        assert heads.retrieval == tuple(range(HEADS))
        assert heads.full_kv == tuple(range(KV_HEADS))
        assert not heads.has_indexer
