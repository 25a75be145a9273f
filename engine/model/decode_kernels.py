"""Decode attention of every layer on the CUDA kernels (`kernels.cuda_decode`).

Shapes: R decode rows, H query heads, S heads of a layer that select blocks, D head_dim,
I index_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.model.batch_tensors import AttentionMetadata
from engine.model.config import ModelConfig
from engine.model.head_layout import LayerHeads, model_heads
from engine.model.queries import Queries
from kernels._launch import KernelLibrary
from kernels.cuda_decode import attend
from kernels.decode_inputs import PagedPool, Selection, WindowRule
from kernels.decode_workspace import DecodeWorkspace
from kernels.head_tiles import HeadRole, HeadTiles

if TYPE_CHECKING:
    from engine.model.attention_layers import AttentionLayers


class DecodeKernels:
    """Tiles of all layers and one workspace that they share."""

    def __init__(
        self,
        library: KernelLibrary,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        max_rows: int,
        max_blocks: int,
    ) -> None:
        """
        Args:
            max_rows: rows of one launch; more of them, as a long replay has, take several.
            max_blocks: width of the block tables.

        Raises:
            KernelError: no kernel for this dtype and head_dim.
            ValueError: contexts of more blocks than the kernels take.
        """
        self.max_rows = max_rows
        self._tiles = [
            HeadTiles.make(head_roles(heads), device, split_roles=heads.has_indexer)
            for heads in model_heads(config)
        ]
        self._workspace = DecodeWorkspace(
            library,
            device,
            dtype,
            config.head_dim,
            max_rows=max_rows,
            max_tiles=max(tiles.count for tiles in self._tiles),
            max_selecting=max(len(tiles.tile_of_selected_S) for tiles in self._tiles),
            max_blocks=max_blocks,
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the workspace."""
        return self._workspace.num_bytes

    def attend(
        self,
        layers: AttentionLayers,
        layer: int,
        queries: Queries,
        out_RHD: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor | None:
        """Write `out_RHD`; keys, values and index keys of the rows are in their pages already.

        A row whose context is 0 pads the batch and gets zeros. Waits for nothing on the device.

        Returns:
            Tokens attended, int64 [R, S]; None in a layer that does not select.
        """
        q_RHD, attended_RS = queries.rotated_THD, None
        if layers.indexers[layer] is not None:
            attended_RS = q_RHD.new_empty(
                (len(q_RHD), len(layers.heads[layer].index_row)), dtype=torch.int64
            )
        for start in range(0, len(q_RHD), self.max_rows):
            part = slice(start, start + self.max_rows)
            pools, selection = self._inputs(layers, layer, queries.take(part), metadata, part)
            attend(
                self._workspace,
                self._tiles[layer],
                q_RHD[part],
                out_RHD[part],
                *pools,
                metadata.decode_lens_R[part],
                WindowRule(layers.window, layers.sinks),
                layers.scale,
                selection,
                None if attended_RS is None else attended_RS[part],
            )
        return attended_RS

    def _inputs(
        self,
        layers: AttentionLayers,
        layer: int,
        queries: Queries,
        metadata: AttentionMetadata,
        part: slice,
    ) -> tuple[tuple[PagedPool | None, PagedPool | None], Selection | None]:
        """Pools that the layer has heads in, full and window, and what it selects by."""
        heads, roles = layers.heads[layer], layers.roles[layer]
        cache, indexer = layers.caches[layer], layers.indexers[layer]
        full = window = selection = None
        if heads.full_kv:
            full = PagedPool(cache.full_k, cache.full_v, metadata.decode_full_RB[part])
        if heads.windowed_kv:
            window = PagedPool(cache.window_k, cache.window_v, metadata.decode_window_RB[part])
        if indexer is not None:
            selection = Selection(
                qi_RSI=queries.in_index_space(indexer, roles.retrieval.heads_H),
                index_row_S=roles.index_row_H,
                index_cache=cache.index,
                top_p_S=roles.top_p_H,
                own_top_p_R=metadata.top_p_R[part],
                dense_below=layers.dense_below,
                index_scales=cache.index_scales,
                age_bias_SA=indexer.age_bias_HA,
            )
        return (full, window), selection


def head_roles(heads: LayerHeads) -> list[HeadRole]:
    """What each query head of a layer reads, in the order of the heads."""
    roles: dict[int, HeadRole] = {}
    for index, (head, row) in enumerate(zip(heads.retrieval, heads.retrieval_kv_row, strict=True)):
        selected = index if heads.has_indexer else None
        roles[head] = HeadRole("full", row, retrieval=True, selected=selected)
    for head, row in zip(heads.local_on_full, heads.local_on_full_kv_row, strict=True):
        roles[head] = HeadRole("full", row, retrieval=False)
    for head, row in zip(heads.local_on_windowed, heads.local_on_windowed_kv_row, strict=True):
        roles[head] = HeadRole("window", row, retrieval=False)
    return [roles[head] for head in range(len(roles))]
