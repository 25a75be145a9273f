"""What a token of context costs in KV memory. Torch-free."""

from __future__ import annotations

from engine.model.config import ModelConfig
from engine.model.kv_bytes import page_bytes

BFLOAT16_BYTES = 2


def kv_bytes_per_token(config: ModelConfig, length: int) -> int:
    """Bytes in bfloat16 of one sequence of `length` tokens, index keys included, by its tokens.

    Windowed heads keep their window and the sinks, however long the sequence is.
    """
    full, windowed = page_bytes(config, BFLOAT16_BYTES, block_tokens=1)
    if config.sparse is None:
        return full
    kept = min(length, config.sparse.window_tokens + config.sparse.sink_tokens)
    return full + windowed * kept // length
