"""Dense decode attention of one layer by libraries, which sparse attention is held against."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_layer import BLOCK, DIM, HEADS, KV_HEADS
from benchmarks.decode_layers import BYTES_PER_GRAPH
from benchmarks.device_times import graph_microseconds, unless_refused
from benchmarks.flashinfer_peer import FlashInfer

BACKENDS = (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION))
Caches = list[tuple[Tensor, Tensor]]


def dense_microseconds(rows: int, context: int, peer: FlashInfer | None) -> dict[str, float]:
    """Dense attention by library, each in its fastest form; one that refuses is left out."""
    shape = (rows, KV_HEADS, context, DIM)
    layers = max(1, BYTES_PER_GRAPH // (4 * rows * KV_HEADS * context * DIM))

    def random() -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    caches = [(random(), random()) for _ in range(layers)]
    q_RHD = torch.randn(rows, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    found = _of_torch(q_RHD, caches)
    if peer is not None:
        pages_RB = torch.randperm(rows * context // BLOCK, device="cuda").view(rows, -1)
        paged = [
            (k.view(-1, KV_HEADS, BLOCK, DIM), v.view(-1, KV_HEADS, BLOCK, DIM)) for k, v in caches
        ]
        with unless_refused(peer.name):
            found[peer.name] = graph_microseconds(peer.decode_calls(q_RHD, paged, pages_RB))
    return found


def _of_torch(q_RHD: Tensor, caches: Caches) -> dict[str, float]:
    """PyTorch's backends over contiguous keys and values, the faster of two forms.

    The query heads of a KV head can be passed as its queries, which FlashAttention-2 takes well.
    cuDNN splits the context only for a single query: for it they must be heads that share keys, or
    a context is read by as many CTAs as there are KV heads.
    """
    q_RH1D = q_RHD[:, :, None]
    grouped = q_RHD.view(len(q_RHD), KV_HEADS, -1, DIM)
    attend = scaled_dot_product_attention
    forms = (
        [partial(attend, grouped, k, v) for k, v in caches],
        [partial(attend, q_RH1D, k, v, enable_gqa=True) for k, v in caches],
    )
    found: dict[str, float] = {}
    for name, backend in BACKENDS:
        for calls in forms:
            with unless_refused(name), sdpa_kernel(backend):
                took = graph_microseconds(calls)
                found[name] = min(took, found.get(name, took))
    return found
