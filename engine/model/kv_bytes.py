"""What keys, values and index keys take, by page and by token. Torch-free."""

from __future__ import annotations

from typing import Literal

from engine.model.config import ModelConfig
from engine.model.head_layout import model_heads

IndexDtype = Literal["auto", "int8"]  # of index keys; auto: that of keys and values
SCALE_BYTES = 2  # of an int8 index key: one bfloat16
DENSE_BLOCK_TOKENS = 64  # page size of a model without a sparse section


def block_tokens_of(config: ModelConfig) -> int:
    """Tokens of a page for a model as it is stored, however it is served then."""
    return DENSE_BLOCK_TOKENS if config.sparse is None else config.sparse.block_tokens


def index_key_bytes(config: ModelConfig, item_bytes: int, index_dtype: IndexDtype = "auto") -> int:
    """Bytes of one index key, its scale included; 0 without an indexer."""
    if config.sparse is None or config.sparse.index_dim is None:
        return 0
    dim = config.sparse.index_dim
    return dim + SCALE_BYTES if index_dtype == "int8" else dim * item_bytes


def page_bytes(
    config: ModelConfig, item_bytes: int, block_tokens: int, index_dtype: IndexDtype = "auto"
) -> tuple[int, int]:
    """Bytes of one page of the full pool (index keys included) and of the window pool.

    Args:
        item_bytes: of one element of keys and values.
    """
    head = 2 * config.head_dim * item_bytes
    index_key = index_key_bytes(config, item_bytes, index_dtype)
    full = window = 0
    for heads in model_heads(config):
        full += len(heads.full_kv) * head + heads.index_rows * index_key
        window += len(heads.windowed_kv) * head
    return full * block_tokens, window * block_tokens


def dense_token_bytes(config: ModelConfig, item_bytes: int) -> int:
    """Bytes per token if every KV head of every layer keeps everything, without index keys."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * item_bytes
