"""Prefill attention of one layer at one length: head-wise attention beside dense attention."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from benchmarks.attention_layer import HEADS, WINDOW
from benchmarks.attention_prefill import PrefillCase
from benchmarks.attention_sparse_prefill import sparse_milliseconds
from benchmarks.dense_prefill import paged_milliseconds, torch_milliseconds, window_peer
from benchmarks.device_times import time_of, unless_refused
from benchmarks.flashinfer_peer import FlashInfer
from kernels import cuda_prefill, prefill_libraries, prefill_triton
from kernels._launch import KernelLibrary
from kernels.prefill_libraries import Span, attend_dense
from kernels.span_inputs import EVERYTHING


def prefill_record(
    library: KernelLibrary, tokens: int, product: float, peer: FlashInfer | None
) -> dict[str, Any]:
    """Dense attention, both of our parts, ratios, and the seconds that measuring took.

    Args:
        product: FLOP per second of a bf16 matrix product, for the floor.
    """
    start = time.monotonic()
    dense = torch_milliseconds(tokens)
    case = PrefillCase.make(tokens)
    window_beside = {}
    if peer is not None:
        dense |= paged_milliseconds(case, peer)
        window_beside = window_peer(case, peer)
    window_ms = windowed_milliseconds(library, case)
    retrieval_ms = retrieval_milliseconds(library, case, peer)
    sparse_ms = sparse_milliseconds(library, case)
    window, retrieval = (min(found.values()) for found in (window_ms, retrieval_ms))
    window_work = case.flops(len(case.local_G), WINDOW)
    retrieval_work = case.flops(len(case.retrieval_G))
    floor = (window_work + retrieval_work) / product * 1000
    return {
        "tokens": tokens,
        "dense_ms": dense,
        "dense_teraflops": {name: case.flops(HEADS) / ms / 1e9 for name, ms in dense.items()},
        "window_ms": window_ms,
        "window_teraflops": window_work / window / 1e9,
        "window_peer": window_beside,
        "retrieval_ms": retrieval_ms,
        "retrieval_teraflops": retrieval_work / retrieval / 1e9,
        "floor_ms": floor,
        "over_floor": (window + retrieval) / floor,
        "sparse_ms": sparse_ms,
        **ratios(dense, window + retrieval, window + sum(sparse_ms.values())),
        "seconds": time.monotonic() - start,
    }


def ratios(dense: dict[str, float], total: float, sparse_total: float) -> dict[str, Any]:
    """Milliseconds of all heads, and how much faster than each dense attention they are."""
    return {
        "total_ms": total,
        "sparse_total_ms": sparse_total,
        "fastest_dense": min(dense, key=dense.__getitem__, default=None),
        "times_faster": {name: ms / total for name, ms in dense.items()},
        "sparse_times_faster": {name: ms / sparse_total for name, ms in dense.items()},
    }


def windowed_milliseconds(library: KernelLibrary, case: PrefillCase) -> dict[str, float]:
    """Window and sinks of the local heads by kernel."""
    args = (case.spans_of(case.local_G), WINDOW, case.sinks, case.scale)
    found: dict[str, float] = {}
    with unless_refused("cuda"):
        found["cuda"] = time_of(partial(cuda_prefill.attend_spans, library, *args))
    with unless_refused("triton"):
        found["triton"] = time_of(partial(prefill_triton.attend_spans, *args))
    return found


def retrieval_milliseconds(
    library: KernelLibrary, case: PrefillCase, peer: FlashInfer | None
) -> dict[str, float]:
    """Causal attention of the retrieval heads by kernel, gathering of pages included."""
    inputs = case.spans_of(case.retrieval_G)
    spans = [Span(slice(0, case.tokens), case.tokens)]
    own = partial(cuda_prefill.attend_spans, library, inputs, EVERYTHING, 0, case.scale)
    found: dict[str, float] = {}
    with unless_refused("cuda"):
        found["cuda"] = time_of(own)
    for backend in prefill_libraries.available():
        # FlashAttention-2 is never the fastest on such a chip; FlashInfer may not work here.
        if backend == "cudnn" or (backend == "flashinfer" and peer is not None):
            with unless_refused(backend):
                found[backend] = time_of(partial(attend_dense, backend, inputs, spans, case.scale))
    return found
