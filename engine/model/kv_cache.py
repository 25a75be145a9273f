"""The memory of both KV pools, per layer; shapes as in `kernels.reference`.

    full    k, v   [P, full KV heads, K, D]      index  [P, index rows, K, I]
    window  k, v   [P, windowed KV heads, K, D]

Page 0 of each pool is the null page. Which page belongs to whom is the scheduler's matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.head_layout import LayerHeads, model_heads


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Caches of one layer; a pool that holds none of its heads has zero rows."""

    full_k: Tensor
    full_v: Tensor
    index: Tensor
    window_k: Tensor
    window_v: Tensor


class KVCache:
    """Both pools of all layers, allocated and touched at once: the memory is really there."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        full_pages: int,
        window_pages: int,
        block_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            full_pages, window_pages: usable pages; one more is allocated for the null page.
            dtype: of keys, values and index keys.
        """
        self.block_tokens = block_tokens
        index_dim = 0
        if config.sparse is not None and config.sparse.index_dim is not None:
            index_dim = config.sparse.index_dim

        def pages(count: int, rows: int, width: int) -> Tensor:
            shape = (count + 1, rows, block_tokens, width)
            return torch.empty(shape, device=device, dtype=dtype).zero_()

        def layer(heads: LayerHeads) -> LayerCache:
            full, windowed, dim = len(heads.full_kv), len(heads.windowed_kv), config.head_dim
            return LayerCache(
                full_k=pages(full_pages, full, dim),
                full_v=pages(full_pages, full, dim),
                index=pages(full_pages, heads.index_rows, index_dim),
                window_k=pages(window_pages, windowed, dim),
                window_v=pages(window_pages, windowed, dim),
            )

        self.layers = [layer(heads) for heads in model_heads(config)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all pools, null pages included."""
        tensors = (
            tensor
            for layer in self.layers
            for tensor in (layer.full_k, layer.full_v, layer.index, layer.window_k, layer.window_v)
        )
        return sum(tensor.nbytes for tensor in tensors)
