"""Writing to and reading from paged caches [P, N, K, D]; legend in `kernels.reference`."""

from __future__ import annotations

from torch import Tensor

from kernels._checks import check_shapes


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


def store_index_keys(index_keys_THI: Tensor, index_cache: Tensor, slots_T: Tensor) -> None:
    """Write index keys of new tokens into [P, index rows, K, I] in place."""
    check_shapes(
        {}, keys=(index_keys_THI, "T H I"), cache=(index_cache, "P H K I"), slots=(slots_T, "T")
    )
    _store(index_keys_THI, index_cache, slots_T)


def gather_pages(cache: Tensor, row: int, pages_B: Tensor) -> Tensor:
    """One KV head's tokens from the given pages in order: [B * K, D], a copy."""
    return cache[pages_B, row].flatten(0, 1)


def _store(rows_TND: Tensor, cache: Tensor, slots_T: Tensor) -> None:
    block_tokens = cache.shape[2]
    cache[slots_T // block_tokens, :, slots_T % block_tokens] = rows_TND.to(cache.dtype)
