"""The memory of both KV pools, per layer; shapes as in `kernels.reference`.

    full    k, v   [P, full KV heads, K, D]      index  [P, index rows, K, I], scales [P, rows, K]
    window  k, v   [P, windowed KV heads, K, D]

Page 0 of each pool is the null page. Which page belongs to whom is the scheduler's matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.head_layout import LayerHeads, model_heads
from engine.model.kv_bytes import IndexDtype


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Caches of one layer; a pool that holds none of its heads has zero rows."""

    full_k: Tensor
    full_v: Tensor
    index: Tensor
    window_k: Tensor
    window_v: Tensor
    index_scales: Tensor | None = None  # bfloat16, of int8 index keys

    @property
    def full_tensors(self) -> tuple[Tensor, ...]:
        """All that lies in pages of the full pool."""
        scales = () if self.index_scales is None else (self.index_scales,)
        return (self.full_k, self.full_v, self.index, *scales)

    @property
    def window_tensors(self) -> tuple[Tensor, ...]:
        """All that lies in pages of the window pool."""
        return (self.window_k, self.window_v)


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
        index_dtype: IndexDtype = "auto",
    ) -> None:
        """
        Args:
            full_pages, window_pages: usable pages; one more is allocated for the null page.
            dtype: of keys and values.
            index_dtype: of index keys; int8 ones have scales beside them.
        """
        self.block_tokens = block_tokens
        index_dim = 0
        if config.sparse is not None and config.sparse.index_dim is not None:
            index_dim = config.sparse.index_dim

        def pages(count: int, rows: int, *width: int, dtype: torch.dtype = dtype) -> Tensor:
            shape = (count + 1, rows, block_tokens, *width)
            return torch.empty(shape, device=device, dtype=dtype).zero_()

        quantised = index_dtype == "int8"
        key_dtype = torch.int8 if quantised else dtype

        def layer(heads: LayerHeads) -> LayerCache:
            full, windowed, dim = len(heads.full_kv), len(heads.windowed_kv), config.head_dim
            return LayerCache(
                full_k=pages(full_pages, full, dim),
                full_v=pages(full_pages, full, dim),
                index=pages(full_pages, heads.index_rows, index_dim, dtype=key_dtype),
                window_k=pages(window_pages, windowed, dim),
                window_v=pages(window_pages, windowed, dim),
                index_scales=pages(full_pages, heads.index_rows, dtype=torch.bfloat16)
                if quantised
                else None,
            )

        self.layers = [layer(heads) for heads in model_heads(config)]

    def wipe(self, full_pages: list[int], window_pages: list[int]) -> None:
        """Zero all that lies in these pages, in every layer."""
        for layer in self.layers:
            for tensor in layer.full_tensors:
                tensor[full_pages] = 0
            for tensor in layer.window_tensors:
                tensor[window_pages] = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all pools, null pages included."""
        tensors = (
            tensor for layer in self.layers for tensor in layer.full_tensors + layer.window_tensors
        )
        return sum(tensor.nbytes for tensor in tensors)
