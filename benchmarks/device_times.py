"""Times on a GPU, and the two ceilings that kernels are held against."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.peer_check import PeerError
from kernels._launch import KernelError

SHORT_MS = 300.0  # calls up to here are repeated five times
LONG_MS = 5000.0  # beyond, the first call is the figure: what happens once in it is lost in seconds
REPLAYS = 30
COPIED_BYTES = 2**30


def milliseconds(call: Callable[[], object], repeats: int, warm: int = 1) -> list[float]:
    """Times of calls one after another, by device events."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(repeats):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def time_of(call: Callable[[], object]) -> float:
    """Milliseconds: the median of up to five calls after a first one, fewer of what takes long.

    A first call may choose or compile a kernel: it counts only where it takes more than LONG_MS.
    """
    first = milliseconds(call, repeats=1, warm=0)[0]
    if first > LONG_MS:
        return first
    repeats = min(5, max(1, int(5 * SHORT_MS / first)))
    return statistics.median(milliseconds(call, repeats, warm=0))


@contextmanager
def unless_refused(name: str) -> Iterator[None]:
    """What a kernel or library refuses here, or gets wrong, ends the block with a line."""
    try:
        yield
    except (RuntimeError, KernelError, PeerError, ValueError) as error:
        print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)


def graph_microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one of the calls when all are replayed in a CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = milliseconds(graph.replay, REPLAYS)
    return 1000 * statistics.median(times) / len(calls)


def copy_bandwidths() -> dict[str, float]:
    """Bytes read and written per second when 1 GiB is copied: by the driver, and by a kernel.

    What a kernel may hope for is the larger: in a graph the driver's copy is not always the best.
    """
    source = torch.empty(COPIED_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    copies: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "kernel": lambda: torch.neg(source, out=target),
    }
    return {
        name: 2 * COPIED_BYTES / (1e-6 * graph_microseconds([call]))
        for name, call in copies.items()
    }


def product_flops(size: int = 8192) -> float:
    """Of a bf16 matrix product per second."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    took = statistics.median(milliseconds(lambda: a @ b, repeats=10, warm=3))
    return 2.0 * size**3 / took * 1000
