"""Which heads of a layer do what, and where their keys and values live. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerHeads:
    """Head roles of one layer (design section 5).

    A KV head is *full* if a retrieval query head is in its group, else *windowed*. Its keys and
    values lie in the pool of that name, at the row that `full_kv` or `windowed_kv` gives it. A
    local query head of a full KV head reads the full pool under the window rule.
    """

    full_kv: tuple[int, ...]  # model KV heads in the full pool, ascending; cache row = position
    windowed_kv: tuple[int, ...]  # model KV heads in the window pool
    retrieval: tuple[int, ...]  # query heads with full context
    retrieval_kv_row: tuple[int, ...]  # their KV head's row in the full pool
    local_on_full: tuple[int, ...]  # local query heads whose KV head is full
    local_on_full_kv_row: tuple[int, ...]
    local_on_windowed: tuple[int, ...]  # local query heads whose KV head is windowed
    local_on_windowed_kv_row: tuple[int, ...]
    index_row: tuple[int, ...]  # per retrieval head: its row of index keys (empty: no indexer)
    index_rows: int  # rows of index keys in this layer: retrieval heads or full KV heads, or 0
    top_p: tuple[float, ...]  # per retrieval head; empty without an indexer

    @property
    def has_indexer(self) -> bool:
        return self.index_rows > 0


def layer_heads(config: ModelConfig, layer: int) -> LayerHeads:
    """Roles in `layer`; a model without a sparse section has retrieval heads only, no indexer."""
    sparse = config.sparse
    retrieval = tuple(range(config.num_heads)) if sparse is None else sparse.retrieval_heads[layer]
    group = config.group_size
    kept = set(retrieval)
    full_kv = tuple(sorted({head // group for head in retrieval}))
    full_row = {kv: row for row, kv in enumerate(full_kv)}
    windowed_kv = tuple(kv for kv in range(config.num_kv_heads) if kv not in full_row)
    windowed_row = {kv: row for row, kv in enumerate(windowed_kv)}
    local = [head for head in range(config.num_heads) if head not in kept]
    on_full = tuple(head for head in local if head // group in full_row)
    on_windowed = tuple(head for head in local if head // group in windowed_row)
    retrieval_row = tuple(full_row[head // group] for head in retrieval)

    index_row: tuple[int, ...] = ()
    index_rows = 0
    top_p: tuple[float, ...] = ()
    if sparse is not None and sparse.index_dim is not None and retrieval:
        by_kv = sparse.index_scope == "kv_head"
        index_row = retrieval_row if by_kv else tuple(range(len(retrieval)))
        index_rows = len(full_kv) if by_kv else len(retrieval)
        top_p = sparse.top_p[layer]
    return LayerHeads(
        full_kv=full_kv,
        windowed_kv=windowed_kv,
        retrieval=retrieval,
        retrieval_kv_row=retrieval_row,
        local_on_full=on_full,
        local_on_full_kv_row=tuple(full_row[head // group] for head in on_full),
        local_on_windowed=on_windowed,
        local_on_windowed_kv_row=tuple(windowed_row[head // group] for head in on_windowed),
        index_row=index_row,
        index_rows=index_rows,
        top_p=top_p,
    )


def model_heads(config: ModelConfig) -> tuple[LayerHeads, ...]:
    """Roles of every layer."""
    return tuple(layer_heads(config, layer) for layer in range(config.num_layers))
