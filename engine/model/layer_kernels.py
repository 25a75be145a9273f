"""What a layer does around attention, on the CUDA kernels (`kernels.cuda_store`, `cuda_layer`).

Beside its products and attention four launches of a layer are left: the store, two norms that add
the branch before them, and the gate. A mixture of experts has three and its weighted sum. Without a
library the PyTorch ops of `engine.model.layers` compute the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.model.batch_tensors import AttentionMetadata
from engine.model.config import ModelConfig, MoeConfig
from engine.model.head_layout import LayerHeads, model_heads
from engine.model.queries import Queries
from kernels import cuda_experts, cuda_layer, cuda_store
from kernels._launch import KernelLibrary
from kernels.layer_inputs import HeadNorm, IndexProjections, StoredPool

if TYPE_CHECKING:
    from engine.model.attention_layers import AttentionLayers
    from engine.model.layers import Projection, RMSNorm


class LayerKernels:
    """The kernels, and where each layer's KV heads are kept."""

    def __init__(self, library: KernelLibrary, config: ModelConfig, device: torch.device) -> None:
        self.library = library
        self._kv_rows = [
            torch.tensor(kv_rows(heads), dtype=torch.int32, device=device)
            for heads in model_heads(config)
        ]

    @staticmethod
    def take(config: ModelConfig, dtype: torch.dtype) -> bool:
        """Whether there are kernels for the sizes of a model."""
        index_dim = None if config.sparse is None else config.sparse.index_dim
        sizes = [config.hidden_size, config.intermediate_size]
        if config.moe is not None:
            sizes.append(config.moe.intermediate_size)
        heads = cuda_store.takes_heads(dtype, config.head_dim, index_dim)
        return heads and all(cuda_layer.takes_rows(dtype, size) for size in sizes)

    def add_norm(
        self, x_TE: Tensor, branch_TE: Tensor | None, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """The residual stream with a branch added, and its norm."""
        return cuda_layer.add_norm(self.library, x_TE, branch_TE, norm.weight, norm.eps)

    def silu_mul(self, gate_up_TF: Tensor) -> Tensor:
        """silu(gate) * up of [T, 2 F]."""
        return cuda_layer.silu_mul(self.library, gate_up_TF)

    @staticmethod
    def takes_experts(tokens: int, moe: MoeConfig) -> bool:
        """Whether a mixture of experts runs on the kernels for so many tokens."""
        return cuda_experts.takes_experts(tokens, moe.num_experts, moe.experts_per_token)

    def run_experts(
        self,
        x_TE: Tensor,
        logits_TX: Tensor,
        gate_up_XGE: Tensor,
        down_XEF: Tensor,
        moe: MoeConfig,
    ) -> tuple[Tensor, Tensor]:
        """Weights [T, k] and results [T, k, E] of the experts that the logits choose."""
        library, chosen = self.library, moe.experts_per_token
        weights_Tk, experts_Tk = cuda_experts.route_experts(
            library, logits_TX, chosen, moe.normalize_weights
        )
        inner_JF = cuda_experts.gate_experts(library, x_TE, experts_Tk, gate_up_XGE)
        results_JE = cuda_experts.project_experts(library, inner_JF, experts_Tk, down_XEF)
        return weights_Tk, results_JE.view(len(x_TE), chosen, -1)

    def store(
        self,
        layers: AttentionLayers,
        layer: int,
        projection: Projection,
        metadata: AttentionMetadata,
    ) -> Queries:
        """Store a layer's keys, values and index keys; its queries, as attention wants them."""
        heads, cache, norm = layers.heads[layer], layers.caches[layer], projection.norm
        full = window = None
        if heads.full_kv:
            full = StoredPool(cache.full_k, cache.full_v, metadata.full_slots_T)
        if heads.windowed_kv:
            window = StoredPool(cache.window_k, cache.window_v, metadata.window_slots_T)
        stored = cuda_store.store_qkv(
            self.library,
            projection.qkv_TRD,
            projection.heads,
            None if norm is None else HeadNorm(norm.weight, norm.eps),
            projection.cos.squeeze(1),
            projection.sin.squeeze(1),
            self._kv_rows[layer],
            full,
            window,
            _index(layers, layer, metadata),
        )
        return Queries(stored.q_THD, index_TSI=stored.qi_QSI)


def kv_rows(heads: LayerHeads) -> list[int]:
    """Row of each KV head in the full pool, or -1 - row in the window pool."""
    rows = {kv: row for row, kv in enumerate(heads.full_kv)}
    rows |= {kv: -1 - row for row, kv in enumerate(heads.windowed_kv)}
    return [rows[kv] for kv in range(len(rows))]


def _index(
    layers: AttentionLayers, layer: int, metadata: AttentionMetadata
) -> IndexProjections | None:
    """Decode rows, which come first, have index queries; prompt tokens if they select too."""
    indexer, roles = layers.indexers[layer], layers.roles[layer]
    if indexer is None:
        return None
    selects = layers.prefill_attention == "sparse"
    cache = layers.caches[layer]
    return IndexProjections(
        k_proj_XID=indexer.k_proj_HID,
        k_head_X=roles.index_head_X,
        q_proj_SID=indexer.q_proj_HID,
        q_head_S=roles.retrieval.heads_H,
        index_cache=cache.index,
        query_tokens=len(metadata.token_ids_T) if selects else metadata.num_decode_rows,
        index_scales=cache.index_scales,
    )
