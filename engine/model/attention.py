"""Attention of the serving path: head roles over the paged cache (design section 5).

Shapes: T tokens of the step (decode rows first), R decode rows, H query heads, N KV heads,
D head_dim, I index_dim, B block-table width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.model.attention_layers import AttentionLayers
from engine.model.batch_tensors import AttentionMetadata
from engine.model.kv_cache import LayerCache
from engine.model.layer_roles import HeadGroup
from engine.model.layers import Projection
from engine.model.prefill_kernels import attend_prefill
from engine.model.queries import Queries
from kernels.decode import decode_dense, decode_sparse, decode_windowed
from kernels.indexer import count_attended, project_index, score_blocks
from kernels.paged_kv import store_index_keys, store_kv
from kernels.prefill import prefill_dense, prefill_windowed
from kernels.prefill_sparse import prefill_sparse, score_tiles, select_tiles
from kernels.prefill_tiles import PrefillTiles
from kernels.window_plan import WindowPlan


@dataclass(slots=True)
class PagedAttention:
    """Implements `engine.model.layers.Attention` for one step over the paged cache.

    Every layer stores the step's keys, values and index keys first and attends then, so spans of
    one sequence may stand in the same step.
    """

    layers: AttentionLayers
    metadata: AttentionMetadata
    attended: dict[int, Tensor] = field(default_factory=dict)
    """By layer: tokens attended, int64 [R, retrieval heads], where selection ran; rows whose
    context is below `dense_below` count 0."""
    _window_plan: WindowPlan | None = None
    _prefill_tiles: PrefillTiles | None = None

    def attend(
        self,
        layer: int,
        q_pre_THD: Tensor,
        k_pre_TND: Tensor,
        q_THD: Tensor,
        k_TND: Tensor,
        v_TND: Tensor,
    ) -> Tensor:
        self._store(layer, k_pre_TND, k_TND, v_TND)
        return self._attend(layer, Queries(q_THD, q_pre_THD))

    def attend_projection(self, layer: int, projection: Projection) -> Tensor:
        """`attend` from the projection as it is: one launch does what comes before attention."""
        kernels = self.layers.layer_kernels
        if kernels is None:
            return self.attend(layer, *projection.rotated())
        return self._attend(layer, kernels.store(self.layers, layer, projection, self.metadata))

    def _attend(self, layer: int, queries: Queries) -> Tensor:
        """Attention [T, H, D]; what the tokens themselves add is in the pages already."""
        out_THD = torch.empty_like(queries.rotated_THD)
        rows = self.metadata.num_decode_rows
        if rows:
            self._decode(layer, queries.take(slice(rows)), out_THD[:rows])
        if self.metadata.num_prefill_spans:
            self._prefill(layer, queries.take(slice(rows, None)), out_THD[rows:])
        return out_THD

    def _store(self, layer: int, k_pre_TND: Tensor, k_TND: Tensor, v_TND: Tensor) -> None:
        heads, roles = self.layers.heads[layer], self.layers.roles[layer]
        cache, metadata = self.layers.caches[layer], self.metadata
        if heads.full_kv:
            full = roles.full_kv_N
            k, v = (k_TND[:, full], v_TND[:, full]) if heads.windowed_kv else (k_TND, v_TND)
            store_kv(k, v, cache.full_k, cache.full_v, metadata.full_slots_T)
        if heads.windowed_kv:
            windowed = roles.windowed_kv_N
            k, v = (k_TND[:, windowed], v_TND[:, windowed]) if heads.full_kv else (k_TND, v_TND)
            store_kv(k, v, cache.window_k, cache.window_v, metadata.window_slots_T)
        indexer = self.layers.indexers[layer]
        if heads.has_indexer and indexer is not None:
            keys_TXI = project_index(k_pre_TND, indexer.k_proj_HID, roles.index_head_X)
            store_index_keys(keys_TXI, cache.index, metadata.full_slots_T, cache.index_scales)

    def _prefill(self, layer: int, queries: Queries, out_THD: Tensor) -> None:
        roles, cache = self.layers.roles[layer], self.layers.caches[layer]
        metadata, static, q_THD = self.metadata, self.layers, queries.rotated_THD
        if static.prefill_kernels is not None:
            given = (static, layer, queries, out_THD, metadata)
            attend_prefill(static.prefill_kernels, *given, self._tiles)
            return
        ends = (metadata.prefill_starts, metadata.prefill_lens_S)
        full = (cache.full_k, cache.full_v, metadata.prefill_full_SB, *ends)
        window = (cache.window_k, cache.window_v, metadata.prefill_window_SB, *ends)
        rule = (static.window, static.sinks, static.scale)
        for group in _present(roles.retrieval):
            q = group.pick(q_THD)
            mask_ZHB = self._select_tiles(layer, queries, cache)
            group.place(
                prefill_dense(q, group.kv_row_H, *full, static.scale)
                if mask_ZHB is None
                else prefill_sparse(
                    q, group.kv_row_H, *full[:3], self._tiles(), mask_ZHB, static.scale
                ),
                out_THD,
            )
        for group in _present(roles.local_on_full):
            q = group.pick(q_THD)
            group.place(prefill_windowed(q, group.kv_row_H, *full, *rule), out_THD)
        for group in _present(roles.local_on_windowed):
            q = group.pick(q_THD)
            group.place(prefill_windowed(q, group.kv_row_H, *window, *rule), out_THD)

    def _decode(self, layer: int, queries: Queries, out_RHD: Tensor) -> None:
        roles, cache = self.layers.roles[layer], self.layers.caches[layer]
        metadata, static, q_RHD = self.metadata, self.layers, queries.rotated_THD
        if static.kernels is not None:
            attended_RH = static.kernels.attend(static, layer, queries, out_RHD, metadata)
            if attended_RH is not None:
                self.attended[layer] = attended_RH
            return
        lens = metadata.decode_lens_R
        full = (cache.full_k, cache.full_v, metadata.decode_full_RB, lens)
        window = (cache.window_k, cache.window_v, metadata.decode_window_RB, lens)
        rule = (static.window, static.sinks, static.scale)
        for group in _present(roles.retrieval):
            q = group.pick(q_RHD)
            mask_RHB = self._select(layer, queries, cache)
            group.place(
                decode_dense(q, group.kv_row_H, *full, static.scale)
                if mask_RHB is None
                else decode_sparse(q, group.kv_row_H, *full, mask_RHB, static.scale),
                out_RHD,
            )
        for group in _present(roles.local_on_full):
            q = group.pick(q_RHD)
            group.place(decode_windowed(q, group.kv_row_H, *full, *rule, self._plan()), out_RHD)
        for group in _present(roles.local_on_windowed):
            q = group.pick(q_RHD)
            group.place(decode_windowed(q, group.kv_row_H, *window, *rule, self._plan()), out_RHD)

    def _select_tiles(self, layer: int, queries: Queries, cache: LayerCache) -> Tensor | None:
        """Blocks that tiles of prompt tokens read, bool [Z, H, B]; None: everything before them."""
        indexer, metadata, static = self.layers.indexers[layer], self.metadata, self.layers
        dense_from_S = metadata.prefill_dense_from_S
        if static.prefill_attention == "dense" or indexer is None or dense_from_S is None:
            return None
        roles, tiles = static.roles[layer], self._tiles()
        qi_THI = queries.in_index_space(indexer, roles.retrieval.heads_H)
        log_share_ZHB = score_tiles(
            qi_THI,
            roles.index_row_H,
            cache.index,
            metadata.prefill_full_SB,
            tiles,
            cache.index_scales,
            indexer.age_bias_HA,
        )
        rule = (dense_from_S, static.dense_below, static.block_tokens)
        return select_tiles(log_share_ZHB, roles.top_p_H, tiles, *rule)

    def _tiles(self) -> PrefillTiles:
        """Tiles of the prompt tokens: made once, the same in every layer."""
        if self._prefill_tiles is None:
            starts, lens = self.metadata.prefill_starts, self.metadata.prefill_lens_S
            device = self.metadata.token_ids_T.device
            self._prefill_tiles = PrefillTiles.of_spans(starts.tolist(), lens.tolist(), device)
        return self._prefill_tiles

    def _plan(self) -> WindowPlan:
        """What the decode rows see through the window: made once, the same in every layer."""
        if self._window_plan is None:
            self._window_plan = WindowPlan.of_window(
                self.metadata.decode_lens_R,
                self.layers.block_tokens,
                self.metadata.decode_window_RB.shape[1],
                self.layers.window,
                self.layers.sinks,
            )
        return self._window_plan

    def _select(self, layer: int, queries: Queries, cache: LayerCache) -> Tensor | None:
        """Blocks that each row's retrieval heads attend, bool [R, H, B]; None: all of them.

        Rows below `dense_below` take every block and are not counted as a selection.
        """
        indexer, metadata = self.layers.indexers[layer], self.metadata
        selects_R = metadata.decode_lens_R >= max(self.layers.dense_below, 1)
        if indexer is None or not bool(selects_R.any()):
            return None
        roles = self.layers.roles[layer]
        lens_R, block = metadata.decode_lens_R, self.layers.block_tokens
        qi_RHI = queries.in_index_space(indexer, roles.retrieval.heads_H)
        log_mass_RHB = score_blocks(
            qi_RHI,
            roles.index_row_H,
            cache.index,
            metadata.decode_full_RB,
            lens_R,
            cache.index_scales,
            indexer.age_bias_HA,
        )
        own_R1 = metadata.top_p_R.unsqueeze(1)
        top_p_RH = torch.where(own_R1.isnan(), roles.top_p_H, own_R1)
        top_p_RH = top_p_RH.masked_fill(~selects_R.unsqueeze(1), 1.0)  # 1 keeps every block
        mask_RHB = self.layers.selections[layer](log_mass_RHB, top_p_RH, lens_R, block)
        self.attended[layer] = count_attended(mask_RHB, lens_R, block) * selects_R.unsqueeze(1)
        return mask_RHB


def _present(group: HeadGroup) -> tuple[HeadGroup, ...]:
    """The group if the layer has such heads."""
    return (group,) if group.heads_H.numel() else ()
