"""What decode steps read of the KV cache, computed from shapes and counts. Torch-free.

Time in the selection cannot be measured inside a recorded step; bytes can be told exactly, and
decoding is bound by them. A token that is computed at context length n reads

    selected   tokens attended, over the retrieval heads that selected
    index      n index keys of every head that has them, if it selects
    whole      n tokens of every full KV head, if it does not select
    window     the window and the sinks of every KV head with a local query head
    dense      n tokens of every KV head: what full attention would have read instead

`selected` counts every query head for itself, while the kernels read a page once for all heads of
a group: it is an upper bound, and so is `selected` plus `window` on a KV head of both roles.
"""

from __future__ import annotations

from engine.batch import Batch
from engine.messages import ReadBytes, Stats
from engine.model.config import ModelConfig
from engine.model.head_layout import model_heads
from engine.model.kv_bytes import IndexDtype, dense_token_bytes, index_key_bytes
from engine.step import StepResult


def read_bytes(config: ModelConfig, item_bytes: int, index_dtype: IndexDtype = "auto") -> ReadBytes:
    """Bytes by token and role, of a model as it is served.

    Args:
        item_bytes: of one element of keys and values.
    """
    head = 2 * config.head_dim * item_bytes
    sparse = config.sparse
    layers = model_heads(config)
    local = sum(
        len(set(heads.local_on_full_kv_row)) + len(set(heads.local_on_windowed_kv_row))
        for heads in layers
    )
    index_key = index_key_bytes(config, item_bytes, index_dtype)
    return ReadBytes(
        head=head,
        full=head * sum(len(heads.full_kv) for heads in layers),
        index=index_key * sum(heads.index_rows for heads in layers),
        local=head * local,
        dense=dense_token_bytes(config, item_bytes),
        window_tokens=0 if sparse is None else sparse.window_tokens + sparse.sink_tokens,
    )


def count_reads(stats: Stats, costs: ReadBytes, batch: Batch, result: StepResult) -> None:
    """Add what one step read to `stats`. Replayed tokens are left out, as in the token budget."""
    for span in batch.spans:
        if span.rule != "decode" or not span.sample:
            continue
        context = span.stop
        attended = result.attended.get(span.request_id)
        if attended is not None and attended.pairs:
            stats.attended_tokens += attended.tokens
            stats.context_tokens += attended.pairs * context
            stats.read_selected_bytes += min(attended.tokens * costs.head, context * costs.full)
            stats.read_index_bytes += context * costs.index
        else:
            stats.read_whole_bytes += context * costs.full
        stats.read_window_bytes += min(context, costs.window_tokens) * costs.local
        stats.read_dense_bytes += context * costs.dense
