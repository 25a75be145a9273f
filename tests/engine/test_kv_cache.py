"""The pools: shapes follow the head layout, and bytes are those of the plan."""

from __future__ import annotations

import pytest
import torch

from engine.memory_plan import plan_memory
from engine.model.config import ModelConfig
from engine.model.kv_bytes import IndexDtype
from engine.model.kv_cache import KVCache
from tests.engine.head_map_model import make_model

MODELS = {
    "mixed": make_model([[0], [], [0, 1, 2, 3]]),
    "index-per-kv-head": make_model([[0, 1, 2]], scope="kv_head"),
    "no-indexer": make_model([[0]], index_dim=None),
    "no-full-pool": make_model([[]]),
    "dense": make_model(None, layers=2),
}


@pytest.mark.parametrize("index_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_allocated_bytes_are_the_planned_bytes(
    model: ModelConfig, dtype: torch.dtype, index_dtype: IndexDtype
) -> None:
    plan = plan_memory(
        model,
        item_bytes=dtype.itemsize,
        weight_bytes=0,
        cache_bytes=10**6,
        max_model_len=None,
        max_num_seqs=3,
        max_batch_tokens=64,
        block_tokens=8,
        index_dtype=index_dtype,
    )
    cache = KVCache(
        model,
        full_pages=plan.full_pages,
        window_pages=plan.window_pages,
        block_tokens=plan.block_tokens,
        device=torch.device("cpu"),
        dtype=dtype,
        index_dtype=index_dtype,
    )
    assert cache.num_bytes == plan.cache_bytes


def test_layers_hold_what_their_heads_need() -> None:
    cache = KVCache(
        make_model([[0], [], [0, 1, 2, 3]]),
        full_pages=5,
        window_pages=3,
        block_tokens=8,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    tensors = [(c.full_k, c.full_v, c.index, c.window_k, c.window_v) for c in cache.layers]
    full, window = {n: (6, n, 8, 8) for n in range(3)}, {n: (4, n, 8, 8) for n in range(3)}
    assert [[tuple(t.shape) for t in layer] for layer in tensors] == [
        [full[1], full[1], (6, 1, 8, 4), window[1], window[1]],
        [full[0], full[0], (6, 0, 8, 4), window[2], window[2]],
        [full[2], full[2], (6, 4, 8, 4), window[0], window[0]],
    ]
    assert not any(tensor.any() for layer in tensors for tensor in layer)


@pytest.mark.parametrize("index_dtype", ["auto", "int8"])
def test_wiped_pages_hold_nothing_and_the_others_what_they_held(index_dtype: IndexDtype) -> None:
    cache = KVCache(
        MODELS["mixed"],
        full_pages=4,
        window_pages=3,
        block_tokens=8,
        device=torch.device("cpu"),
        dtype=torch.float32,
        index_dtype=index_dtype,
    )
    for layer in cache.layers:
        for tensor in layer.full_tensors + layer.window_tensors:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 3)
    cache.wipe([1, 4], [2])
    for layer in cache.layers:
        for tensors, wiped in ((layer.full_tensors, {1, 4}), (layer.window_tensors, {2})):
            for tensor in tensors:
                for page, content in enumerate(tensor):
                    assert bool((content == 0).all()) == (page in wiped or not content.numel())
