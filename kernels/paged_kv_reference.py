"""The specification of `kernels.paged_kv`: one token at a time.

    T new tokens, N KV heads in the cache, D head_dim, H rows of index keys, I index_dim,
    P pages, K tokens of a page (block)

A cache is [P, N, K, D]; page 0 is the null page that padding points to.
"""

from __future__ import annotations

import torch
from torch import Tensor

INDEX_STEPS = 127  # of an index key in 8 bits, to either side of 0


def store_kv(
    k_TND: Tensor, v_TND: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor
) -> None:
    """Write keys and values of new tokens; slot = page * K + place in the page, int64."""
    block_tokens = k_cache.shape[2]
    for token, slot in enumerate(slots_T.tolist()):
        page, place = divmod(slot, block_tokens)
        k_cache[page, :, place] = k_TND[token]
        v_cache[page, :, place] = v_TND[token]


def quantise_index_keys(keys_THI: Tensor) -> tuple[Tensor, Tensor]:
    """Index keys in 8 bits and what they are to be multiplied by: int8 [T, H, I], bfloat16 [T, H].

    The scale is the largest |k| of the key over 127; the key is divided by the scale as it is
    stored and rounded to the nearest whole number, of two to the even one. A key of zeros has the
    scale 0. What is not finite gives a scale that is not finite, and so do all its scores.
    """
    steps_THI = torch.zeros(keys_THI.shape, dtype=torch.int8)
    scales_TH = torch.zeros(keys_THI.shape[:2], dtype=torch.bfloat16)
    for token in range(keys_THI.shape[0]):
        for head in range(keys_THI.shape[1]):
            key_I = keys_THI[token, head].float()
            scale = (key_I.abs().max() / INDEX_STEPS).bfloat16()
            scales_TH[token, head] = scale
            if scale != 0 and scale.isfinite():
                steps_I = (key_I / scale.float()).round()
                steps_THI[token, head] = steps_I.clamp(-INDEX_STEPS, INDEX_STEPS)
    return steps_THI, scales_TH


def store_index_keys(
    index_keys_THI: Tensor,
    index_cache: Tensor,
    slots_T: Tensor,
    index_scales: Tensor | None = None,
) -> None:
    """Write index keys of new tokens into [P, index rows, K, I].

    With scales, bfloat16 [P, index rows, K], the cache is int8 and keys are quantised.
    """
    scales_TH = None
    if index_scales is not None:
        index_keys_THI, scales_TH = quantise_index_keys(index_keys_THI)
    block_tokens = index_cache.shape[2]
    for token, slot in enumerate(slots_T.tolist()):
        page, place = divmod(slot, block_tokens)
        index_cache[page, :, place] = index_keys_THI[token]
        if index_scales is not None and scales_TH is not None:
            index_scales[page, :, place] = scales_TH[token]
