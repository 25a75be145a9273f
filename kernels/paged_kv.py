"""Writing to and reading from paged caches [P, N, K, D]; legend in `kernels.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._checks import check_shapes
from kernels.reference import INDEX_STEPS


def store_kv(
    k_TND: Tensor, v_TND: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor
) -> None:
    """Write keys and values of new tokens in place.

    Args:
        k_TND, v_TND: new keys (after RoPE) and values.
        k_cache, v_cache: [P, N, K, D], of the same dtype.
        slots_T: int64, page * K + place in the page; no slot twice.
    """
    check_shapes(
        {},
        k=(k_TND, "T N D"),
        v=(v_TND, "T N D"),
        k_cache=(k_cache, "P N K D"),
        v_cache=(v_cache, "P N K D"),
        slots=(slots_T, "T"),
    )
    _store(k_TND, k_cache, slots_T)
    _store(v_TND, v_cache, slots_T)


def store_index_keys(
    index_keys_THI: Tensor,
    index_cache: Tensor,
    slots_T: Tensor,
    index_scales: Tensor | None = None,
) -> None:
    """Write index keys of new tokens into [P, index rows, K, I] in place.

    Args:
        index_scales: bfloat16 [P, index rows, K] of an int8 cache, written too; None: the cache
            takes keys as they are.
    """
    sizes: dict[str, int] = {}
    check_shapes(
        sizes, keys=(index_keys_THI, "T H I"), cache=(index_cache, "P H K I"), slots=(slots_T, "T")
    )
    if index_scales is not None:
        check_shapes(sizes, scales=(index_scales, "P H K"))
        index_keys_THI, scales_TH = quantise_index_keys(index_keys_THI)
        _store(scales_TH, index_scales, slots_T)
    _store(index_keys_THI, index_cache, slots_T)


def quantise_index_keys(keys_THI: Tensor) -> tuple[Tensor, Tensor]:
    """Index keys in 8 bits and what they are to be multiplied by: int8 [T, H, I], bfloat16 [T, H].

    What is not finite gives a scale that is not finite either.
    """
    keys_THI = keys_THI.float()
    scales_TH = (keys_THI.abs().amax(-1) / INDEX_STEPS).bfloat16()
    steps_THI = (keys_THI / scales_TH.float().unsqueeze(-1)).round_()
    # Zeros have the scale 0, and 0 / 0 is not a number.
    steps_THI = steps_THI.nan_to_num_(0, 0, 0).clamp_(-INDEX_STEPS, INDEX_STEPS)
    return steps_THI.to(torch.int8), scales_TH


def gather_pages(cache: Tensor, row: int, pages_B: Tensor) -> Tensor:
    """One KV head's tokens from the given pages in order: [B * K, D], a copy."""
    return cache[pages_B, row].flatten(0, 1)


def _store(rows_TND: Tensor, cache: Tensor, slots_T: Tensor) -> None:
    block_tokens = cache.shape[2]
    cache[slots_T // block_tokens, :, slots_T % block_tokens] = rows_TND.to(cache.dtype)
