"""What keys, values and index keys take, by page and by token. Torch-free."""

from __future__ import annotations

from engine.model.config import ModelConfig
from engine.model.head_layout import model_heads

DENSE_BLOCK_TOKENS = 64  # page size of a model without a sparse section


def block_tokens_of(config: ModelConfig) -> int:
    """Tokens of a page for a model as it is stored, however it is served then."""
    return DENSE_BLOCK_TOKENS if config.sparse is None else config.sparse.block_tokens


def page_bytes(config: ModelConfig, item_bytes: int, block_tokens: int) -> tuple[int, int]:
    """Bytes of one page of the full pool (index keys included) and of the window pool.

    Args:
        item_bytes: of one element of keys, values and index keys.
    """
    index_dim = 0
    if config.sparse is not None and config.sparse.index_dim is not None:
        index_dim = config.sparse.index_dim
    full = window = 0
    for heads in model_heads(config):
        full += 2 * len(heads.full_kv) * config.head_dim + heads.index_rows * index_dim
        window += 2 * len(heads.windowed_kv) * config.head_dim
    return full * item_bytes * block_tokens, window * item_bytes * block_tokens


def dense_token_bytes(config: ModelConfig, item_bytes: int) -> int:
    """Bytes per token if every KV head of every layer keeps everything, without index keys."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * item_bytes
