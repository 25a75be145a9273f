"""Dense prefill attention of one layer by libraries, which head-wise attention is held against."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_layer import DIM, HEADS, KV_HEADS, WINDOW
from benchmarks.attention_prefill import PrefillCase, attended_pairs
from benchmarks.device_times import time_of, unless_refused
from benchmarks.flashinfer_peer import FlashInfer
from benchmarks.peer_check import compare_last_token

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
WINDOW_HEADS = 28  # for FlashInfer, in equal groups; ours are 27


def torch_milliseconds(tokens: int) -> dict[str, float]:
    """PyTorch's attention of all heads, contiguous, by backend; one that refuses is left out."""
    q, k, v = (
        torch.randn(1, heads, tokens, DIM, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    found: dict[str, float] = {}
    attend = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
    for name, backend in BACKENDS.items():
        with unless_refused(name), sdpa_kernel(backend):
            found[name] = time_of(attend)
    return found


def paged_milliseconds(case: PrefillCase, peer: FlashInfer) -> dict[str, float]:
    """FlashInfer's attention of all heads, over the pages that ours reads."""
    heads, cache = (case.q_THD, case.out_THD), (case.k_cache, case.v_cache)
    pages = case.tables_SB[0]
    with unless_refused(peer.name):
        took = time_of(peer.prefill_call(*heads, cache, pages))
        compare_last_token(case.out_THD, case.q_THD, cache, pages)
        return {peer.name: took}
    return {}


def window_peer(case: PrefillCase, peer: FlashInfer) -> dict[str, float]:
    """FlashInfer's window pass, without sinks: milliseconds, and TFLOP/s on the unmasked work."""
    q_THD = case.q_THD[:, :WINDOW_HEADS].contiguous()
    cache = (case.k_cache, case.v_cache)
    inputs = (q_THD, torch.empty_like(q_THD), cache, case.tables_SB[0])
    work = 4.0 * DIM * WINDOW_HEADS * attended_pairs(case.tokens, WINDOW, sinks=0)
    with unless_refused(f"{peer.name}, window"):
        took = time_of(peer.prefill_call(*inputs, window=WINDOW))
        return {"milliseconds": took, "teraflops": work / took / 1e9}
    return {}
