"""Models of a few bytes, of which only the head layout matters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.model.config import IndexScope, ModelConfig, RopeConfig, SparseAttentionConfig
from engine.model.decoder import Indexer
from engine.model.head_layout import model_heads
from kernels.block_age import AGE_RANGES


def make_model(
    retrieval: Sequence[Sequence[int]] | None,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    window: int = 11,
    sinks: int = 3,
    index_dim: int | None = 4,
    scope: IndexScope = "query_head",
    age_bias: bool = False,
    top_p: float = 0.5,
    dense_below: int = 0,
    layers: int = 1,
    block: int = 8,
) -> ModelConfig:
    """One with these retrieval heads in each layer; None: a dense one."""
    sparse = None
    if retrieval is not None:
        layers = len(retrieval)
        sparse = SparseAttentionConfig(
            retrieval_heads=tuple(tuple(layer) for layer in retrieval),
            window_tokens=window,
            sink_tokens=sinks,
            index_dim=index_dim,
            index_scope=scope,
            index_age_bias=age_bias,
            block_tokens=block,
            top_p=tuple(tuple(top_p for _ in layer) for layer in retrieval),
            dense_below=dense_below,
        )
    return ModelConfig(
        family="qwen3",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        rms_norm_eps=1e-6,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        qk_norm=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        rope=RopeConfig(theta=1e4),
        sparse=sparse,
    )


def random_indexers(model: ModelConfig, generator: torch.Generator) -> list[Indexer | None]:
    """Weights for every layer that selects; None for the others."""

    def weights(rows: int) -> Tensor:
        assert model.sparse is not None
        assert model.sparse.index_dim is not None
        shape = (rows, model.sparse.index_dim, model.head_dim)
        return torch.randn(shape, generator=generator) * 0.6

    def age_bias(rows: int) -> Tensor | None:
        assert model.sparse is not None
        if not model.sparse.index_age_bias:
            return None
        return torch.randn((rows, AGE_RANGES), generator=generator) * 2

    return [
        Indexer(
            weights(len(heads.retrieval)),
            weights(heads.index_rows),
            age_bias(len(heads.retrieval)),
        )
        if heads.has_indexer
        else None
        for heads in model_heads(model)
    ]
