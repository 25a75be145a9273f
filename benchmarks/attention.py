"""`rtpurbo bench attention`: prefill and decode attention of one layer beside dense attention.

The layer is that of `benchmarks.attention_layer`.

Prefill: one whole prompt. "flash" is PyTorch's FlashAttention-2, "cudnn" its cuDNN attention, both
on all heads, contiguous. Ours is the windowed kernel on 27 heads, then dense attention on five by
the fastest of: our kernel, cuDNN on gathered pages, FlashInfer if installed. The floor is the work
that is not masked at the speed of an 8192 x 8192 bf16 product. Sparse retrieval heads read at each
tile of 128 queries 20 % of the blocks before it, drawn at random.

Decode: see `benchmarks.attention_decode`, whose recipe for keys makes 1, 3 and 10 % of the blocks
carry the mass of each retrieval head. The floor is the bytes to be read at the speed of a copy.

Times are medians of device events; what takes longer than a second is run once. Everything is
measured in one run, for clocks drift.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import attention_decode
from benchmarks.attention_layer import BLOCK, DIM, HEADS, KV_HEADS, WINDOW
from benchmarks.attention_prefill import PrefillCase, milliseconds
from benchmarks.attention_sparse_prefill import sparse_milliseconds
from benchmarks.attention_table import plot, prefill_table
from benchmarks.hardware import describe_hardware
from kernels import cuda_prefill, prefill_libraries, prefill_triton
from kernels._build import KernelBuildError, default_cache, find_library
from kernels._launch import KernelError, KernelLibrary
from kernels.prefill_libraries import Span, attend_dense
from kernels.span_inputs import EVERYTHING

LENGTHS = (2**15, 2**16, 2**17, 2**18, 2**19, 2**20)
QUICK_LENGTHS = (2**15, 2**17)
DECODE_ROWS = (1, 8)
LONGEST_BATCH = 2**20  # tokens of all rows of a decode batch, for the memory of one GPU
LONG_MS = 1000.0
WARM_TOKENS = 2 * WINDOW


@dataclass(frozen=True, slots=True)
class AttentionBench:
    """What to measure."""

    lengths: tuple[int, ...] = LENGTHS
    prefill: bool = True
    decode: bool = True


class BenchError(Exception):
    """There is nothing to measure here; the message is one line."""


def measure(bench: AttentionBench, picture: Path | None = None) -> dict[str, Any]:
    """All figures as one JSON object; tables go to standard error, the plot to `picture`.

    Raises:
        BenchError: no GPU, no kernels for it, lengths that are no whole blocks, or a picture that
            cannot be drawn.
    """
    if not torch.cuda.is_available():
        raise BenchError("bench attention needs a CUDA GPU, and there is none")
    if any(tokens % BLOCK for tokens in bench.lengths):
        raise BenchError(f"lengths must be multiples of {BLOCK}")
    if picture is not None and find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'rtpurbo[plot]'")
    console = Console(stderr=True, width=140)
    try:
        library = KernelLibrary(find_library(default_cache()))
    except (KernelBuildError, KernelError) as error:
        raise BenchError(str(error)) from None
    result = _measure(bench, library, console)
    if result["prefill"]:
        console.print(prefill_table(result["prefill"]))
    if picture is not None:
        try:
            plot(result, picture)
        except (OSError, ValueError) as error:
            raise BenchError(f"{picture}: {error}") from None
    return result


def _measure(bench: AttentionBench, library: KernelLibrary, console: Console) -> dict[str, Any]:
    product = product_flops()
    result: dict[str, Any] = {
        "benchmark": "attention",
        "hardware": describe_hardware(),
        "product_flops_per_second": product,
        "copy_bytes_per_second": attention_decode.copy_bandwidth(),
        "prefill": [],
        "decode": [],
    }
    if bench.prefill:
        # cuDNN takes a second for its first call, which would pass for a call that takes so long.
        prefill_record(library, WARM_TOKENS, product)
    for tokens in bench.lengths if bench.prefill else ():
        console.print(f"prefill of {tokens} tokens", style="dim")
        torch.cuda.empty_cache()
        result["prefill"].append(prefill_record(library, tokens, product))
    shapes = tuple(
        (rows, tokens)
        for rows in DECODE_ROWS
        for tokens in bench.lengths
        if rows * tokens <= LONGEST_BATCH
    )
    torch.cuda.empty_cache()
    if bench.decode and shapes:
        result["decode"] = attention_decode.run(shapes)["records"]
    return result


def product_flops(size: int = 8192) -> float:
    """Of a bf16 matrix product per second."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    took = statistics.median(milliseconds(lambda: a @ b, repeats=10, warm=3))
    return 2.0 * size**3 / took * 1000


def time_of(call: Callable[[], object]) -> float:
    """Milliseconds: the median of five calls, or one call that takes longer than a second."""
    first = milliseconds(call, repeats=1, warm=0)[0]
    if first > LONG_MS:
        return first
    return statistics.median(milliseconds(call, repeats=5, warm=0))


def prefill_record(library: KernelLibrary, tokens: int, product: float) -> dict[str, Any]:
    """One length: dense attention, both of our parts, and ratios."""
    dense = dense_milliseconds(tokens)
    case = PrefillCase.make(tokens)
    window_ms = windowed_milliseconds(library, case)
    retrieval_ms = retrieval_milliseconds(library, case)
    sparse_ms = sparse_milliseconds(library, case)
    window, retrieval = (min(found.values()) for found in (window_ms, retrieval_ms))
    window_work = case.flops(len(case.local_G), WINDOW)
    retrieval_work = case.flops(len(case.retrieval_G))
    total = window + retrieval
    floor = (window_work + retrieval_work) / product * 1000
    return {
        "tokens": tokens,
        "dense_ms": dense,
        "dense_teraflops": {name: case.flops(HEADS) / ms / 1e9 for name, ms in dense.items()},
        "window_ms": window_ms,
        "window_teraflops": window_work / window / 1e9,
        "retrieval_ms": retrieval_ms,
        "retrieval_teraflops": retrieval_work / retrieval / 1e9,
        "total_ms": total,
        "floor_ms": floor,
        "over_floor": total / floor,
        "times_faster": {name: ms / total for name, ms in dense.items()},
        "sparse_ms": sparse_ms,
        "sparse_times_faster": {
            name: ms / (window + sum(sparse_ms.values())) for name, ms in dense.items()
        },
    }


def dense_milliseconds(tokens: int) -> dict[str, float]:
    """PyTorch's attention of all heads by backend; one that refuses is left out."""
    q, k, v = (
        torch.randn(1, heads, tokens, DIM, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    found: dict[str, float] = {}
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, backend in backends.items():

        def attend() -> object:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        with sdpa_kernel(backend):
            _put(found, name, attend)
    return found


def windowed_milliseconds(library: KernelLibrary, case: PrefillCase) -> dict[str, float]:
    """Window and sinks of the local heads by kernel."""
    args = (case.spans_of(case.local_G), WINDOW, case.sinks, case.scale)
    found: dict[str, float] = {}
    _put(found, "cuda", lambda: cuda_prefill.attend_spans(library, *args))
    _put(found, "triton", lambda: prefill_triton.attend_spans(*args))
    return found


def retrieval_milliseconds(library: KernelLibrary, case: PrefillCase) -> dict[str, float]:
    """Causal attention of the retrieval heads by kernel, gathering of pages included."""
    inputs = case.spans_of(case.retrieval_G)
    spans = [Span(slice(0, case.tokens), case.tokens)]
    found: dict[str, float] = {}
    own = (inputs, EVERYTHING, 0, case.scale)
    _put(found, "cuda", lambda: cuda_prefill.attend_spans(library, *own))
    for backend in prefill_libraries.available():
        if backend != "flash":  # never the fastest on such a chip
            _put(found, backend, partial(attend_dense, backend, inputs, spans, case.scale))
    return found


def _put(found: dict[str, float], name: str, call: Callable[[], object]) -> None:
    """The time of a call, unless it cannot run here."""
    try:
        found[name] = time_of(call)
    except (RuntimeError, KernelError, ValueError) as error:
        print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
