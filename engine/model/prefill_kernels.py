"""Prefill attention of a layer on kernels that read pages as they are (`kernels.device_prefill`).

All spans of the step go through one call for each role of the layer's heads, whatever their lengths
and origins. Generated tokens that are replayed are decode rows, not spans: they keep their rule.

Shapes: T prompt tokens of the step, H query heads, D head_dim, G heads of a role.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from engine.model.batch_tensors import AttentionMetadata
from engine.model.layer_roles import HeadGroup
from engine.model.queries import Queries
from kernels.prefill_tiles import PrefillTiles
from kernels.span_inputs import SpanInputs

if TYPE_CHECKING:
    from engine.model.attention_layers import AttentionLayers


class SpanKernels(Protocol):
    """`kernels.device_prefill.DevicePrefill`, whose docstrings say what each writes."""

    @property
    def name(self) -> str: ...

    def attend_windowed(
        self, inputs: SpanInputs, window: int, sinks: int, scale: float
    ) -> None: ...

    def attend_dense(self, inputs: SpanInputs, scale: float) -> None: ...

    def attend_sparse(
        self,
        inputs: SpanInputs,
        tiles: PrefillTiles,
        qi_TGI: Tensor,
        index_row_G: Tensor,
        index_cache: Tensor,
        top_p_G: Tensor,
        dense_from_S: Tensor,
        dense_below: int,
        scale: float,
        index_scales: Tensor | None = None,
        age_bias_GA: Tensor | None = None,
    ) -> None: ...


def attend_prefill(
    kernels: SpanKernels,
    layers: AttentionLayers,
    layer: int,
    queries: Queries,
    out_THD: Tensor,
    metadata: AttentionMetadata,
    tiles: Callable[[], PrefillTiles],
) -> None:
    """Write `out_THD`; keys, values and index keys of the tokens are in their pages already.

    Args:
        tiles: of the step, asked for only in a sparse prefill: it reads the spans on the host.
    """
    heads, roles, cache = layers.heads[layer], layers.roles[layer], layers.caches[layer]
    ends = (metadata.prefill_starts, metadata.prefill_lens_S)
    full = (cache.full_k, cache.full_v, metadata.prefill_full_SB, *ends)
    window = (cache.window_k, cache.window_v, metadata.prefill_window_SB, *ends)
    rule = (layers.window, layers.sinks, layers.scale)

    def inputs(group: HeadGroup, pool: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> SpanInputs:
        return SpanInputs(queries.rotated_THD, out_THD, group.heads_H, group.kv_row_H, *pool)

    indexer, dense_from_S = layers.indexers[layer], metadata.prefill_dense_from_S
    if heads.retrieval:
        spans = inputs(roles.retrieval, full)
        if layers.prefill_attention == "dense" or indexer is None or dense_from_S is None:
            kernels.attend_dense(spans, layers.scale)
        else:
            kernels.attend_sparse(
                spans,
                tiles(),
                queries.in_index_space(indexer, roles.retrieval.heads_H),
                roles.index_row_H,
                cache.index,
                roles.top_p_H,
                dense_from_S,
                layers.dense_below,
                layers.scale,
                cache.index_scales,
                indexer.age_bias_HA,
            )
    if heads.local_on_full:
        kernels.attend_windowed(inputs(roles.local_on_full, full), *rule)
    if heads.local_on_windowed:
        kernels.attend_windowed(inputs(roles.local_on_windowed, window), *rule)
