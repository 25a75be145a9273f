"""Random paged caches for kernel tests: shuffled pages, and NaN wherever nothing was stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.paged_kv import quantise_index_keys


@dataclass(frozen=True, slots=True)
class PagedCase:
    """Caches [P, N, K, D] and index keys [P, X, K, I] for sequences of the given lengths."""

    k_cache: Tensor
    v_cache: Tensor
    index_cache: Tensor
    tables_SB: Tensor
    lens_S: Tensor

    @classmethod
    def make(
        cls,
        lens: Sequence[int],
        *,
        kv_heads: int = 2,
        index_rows: int = 3,
        block: int = 8,
        dim: int = 16,
        index_dim: int = 4,
        seed: int = 0,
    ) -> PagedCase:
        generator = torch.Generator().manual_seed(seed)
        width = max(-(-n // block) for n in lens) + 1  # one column more than any sequence needs
        pages = torch.randperm(len(lens) * width, generator=generator) + 1
        tables_SB = pages.view(len(lens), width).clone()
        shape = (len(pages) + 1, kv_heads, block, dim)
        k_cache, v_cache = (torch.full(shape, torch.nan) for _ in range(2))
        index_cache = torch.full((len(pages) + 1, index_rows, block, index_dim), torch.nan)
        for row, length in enumerate(lens):
            for position in range(length):
                page, place = tables_SB[row, position // block], position % block
                for cache in (k_cache, v_cache, index_cache):
                    values = torch.randn(cache.shape[1], cache.shape[3], generator=generator)
                    cache[page, :, place] = values
            tables_SB[row, -(-length // block) :] = 0
        return cls(k_cache, v_cache, index_cache, tables_SB, torch.tensor(lens))

    def int8_index(self) -> tuple[Tensor, Tensor]:
        """The same index keys in 8 bits: int8 [P, X, K, I], 127 where nothing is stored, and
        scales [P, X, K], NaN there."""
        steps, scales = quantise_index_keys(self.index_cache.flatten(0, 1))
        shape = self.index_cache.shape
        steps = steps.view(shape).masked_fill(self.index_cache.isnan(), 127)
        return steps, scales.view(shape[:3])


def random_tensor(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
