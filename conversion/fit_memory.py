"""What calibration and the fit will need per process, before anything is allocated.

Estimates. The model reads one document at a time and nothing of a layer outlives it, so memory
grows with the document's length and never with its square. Torch-free.
"""

from __future__ import annotations

from engine.model.byte_size import shown_bytes
from engine.model.checkpoint import Checkpoint
from engine.model.config import ModelConfig

CHUNK_BUFFERS = 6  # float32 tensors of a chunk of scores that are alive at once


def reading_bytes(checkpoint: Checkpoint, tokens: int, item: int, chunk_scores: int) -> int:
    """Bytes of reading a document of `tokens` tokens and looking at its attention.

    Args:
        item: bytes of a weight or activation.
        chunk_scores: attention scores that are held at once.
    """
    weights = checkpoint.weight_count * item
    scores = max(chunk_scores, tokens) * 4 * CHUNK_BUFFERS
    return weights + tokens * _token_bytes(checkpoint.config, item) + scores


def describe(count: int, tokens: int, process_bytes: int) -> str:
    """One line for people."""
    size = shown_bytes(process_bytes)
    return f"{count} documents of up to {tokens} tokens, about {size} per process"


def _token_bytes(config: ModelConfig, item: int) -> int:
    """Of one token in one layer: hidden states, queries, keys and values (plain, turned, paged),
    the widest part of the MLP, and two heads' worth of float32 keys and queries."""
    width = config.intermediate_size
    if config.moe is not None:
        width = max(width, config.moe.intermediate_size * config.moe.experts_per_token)
    hidden = config.hidden_size * (4 * item + 8)
    attention = (3 * config.num_heads + 6 * config.num_kv_heads) * config.head_dim * item
    return hidden + attention + 3 * width * item + 4 * config.head_dim * 4
