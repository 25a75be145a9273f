"""`rtpurbo bench attention`: prefill and decode attention of one layer beside dense attention.

The layer is that of `benchmarks.attention_layer`.

Prefill: one whole prompt. "flash" is PyTorch's FlashAttention-2, "cudnn" its cuDNN attention, both
on all heads, contiguous; "flashinfer", where it is installed, FlashAttention-3 over pages. Ours is
the windowed kernel on 27 heads, then dense attention on five by the fastest of: our kernel, cuDNN
on gathered pages, FlashInfer. The floor is the work that is not masked at the speed of an
8192 x 8192 bf16 product. Sparse retrieval heads read at each tile of 128 queries 20 % of the blocks
before it, drawn at random.

Decode: see `benchmarks.attention_decode`, whose recipe for keys makes 1, 3 and 10 % of the blocks
carry the mass of each retrieval head. The floor is the bytes to be read at the speed of a copy.

Times are medians of device events (`benchmarks.device_times`). Everything is measured in one run,
for clocks drift; what was aimed at stands beside it (`benchmarks.attention_targets`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import attention_decode
from benchmarks.attention_layer import BLOCK, WINDOW
from benchmarks.attention_table import decode_table, plot, prefill_table, targets_table
from benchmarks.attention_targets import judge
from benchmarks.device_times import copy_bandwidths, product_flops
from benchmarks.flashinfer_peer import FlashInfer
from benchmarks.hardware import describe_hardware
from benchmarks.peer_check import PeerError
from benchmarks.peer_trial import try_peer
from benchmarks.prefill_figures import prefill_record
from kernels._build import KernelBuildError, default_cache, find_library
from kernels._launch import KernelError, KernelLibrary

LENGTHS = (2**15, 2**16, 2**17, 2**18, 2**19, 2**20)
QUICK_LENGTHS = (2**15, 2**17)
DECODE_ROWS = (1, 8)
LONGEST_BATCH = 2**20  # tokens of all rows of a decode batch, for the memory of one GPU
WARM_TOKENS = 2 * WINDOW
PEER_SECONDS = 300.0  # to compile FlashInfer, once a host, takes 16 cores 140 at most
DAY_SECONDS = 86400.0


@dataclass(frozen=True, slots=True)
class AttentionBench:
    """What to measure, and where to leave it.

    peer: FlashInfer too, if it is installed and ready within peer_seconds, compiling included; the
    others never wait longer for it. picture: drawn at the end. out: the JSON, written anew after
    every row, so that a run which is ended has not been in vain; it is "complete" at the end.
    """

    lengths: tuple[int, ...] = LENGTHS
    prefill: bool = True
    decode: bool = True
    peer: bool = True
    peer_seconds: float = PEER_SECONDS
    picture: Path | None = None
    out: Path | None = None

    @property
    def decode_shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and context of each decode batch."""
        pairs = ((rows, tokens) for rows in DECODE_ROWS for tokens in self.lengths)
        return tuple(pair for pair in pairs if self.decode and pair[0] * pair[1] <= LONGEST_BATCH)


class BenchError(Exception):
    """There is nothing to measure here; the message is one line."""


def measure(bench: AttentionBench) -> dict[str, Any]:
    """All figures as one JSON object; progress and tables go to standard error.

    Raises:
        BenchError: no GPU, no kernels for it, lengths that are no whole blocks, no time for
            FlashInfer, a picture that cannot be drawn or a file that cannot be written.
    """
    _check(bench)
    console = Console(stderr=True, width=160)
    try:
        library = KernelLibrary(find_library(default_cache()))
    except (KernelBuildError, KernelError) as error:
        raise BenchError(str(error)) from None
    peer, about = find_peer(bench, console)
    copies = copy_bandwidths()
    result: dict[str, Any] = {
        "benchmark": "attention",
        "hardware": describe_hardware(),
        "complete": False,
        "peers": {"flashinfer": about},
        "product_flops_per_second": product_flops(),
        "copies_bytes_per_second": copies,
        "copy_bytes_per_second": max(copies.values()),
        "prefill": [],
        "decode": [],
    }
    _save(result, bench.out)
    for part, record in _records(bench, library, peer, result, console):
        result[part].append(record)
        _save(result, bench.out)
    result["prefill"].sort(key=lambda record: record["tokens"])
    result["complete"] = True
    _save(result, bench.out)
    _show(result, bench.picture, console)
    return result


def _check(bench: AttentionBench) -> None:
    """Raises BenchError for what can be known before anything is measured."""
    if not torch.cuda.is_available():
        raise BenchError("bench attention needs a CUDA GPU, and there is none")
    if any(tokens % BLOCK for tokens in bench.lengths):
        raise BenchError(f"lengths must be multiples of {BLOCK}")
    if not 0 < bench.peer_seconds <= DAY_SECONDS:
        raise BenchError("peer_seconds must be more than 0, and a day at most")
    if bench.picture is not None and find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'rtpurbo[plot]'")


def find_peer(bench: AttentionBench, console: Console) -> tuple[FlashInfer | None, dict[str, Any]]:
    """FlashInfer if it works here, and what to say of it either way.

    Whether it does turns out in another process, which can be ended; this one has only to load what
    that one compiled.
    """
    if not bench.peer:
        return None, {"not_measured": "not asked for"}
    try:
        if find_spec("flashinfer") is None:
            raise PeerError("it is not installed")
        at_most = f"{bench.peer_seconds:g} s at most"
        console.print(f"flashinfer: building and checking, {at_most}", style="dim")
        seconds = try_peer(bench.peer_seconds)
        peer = FlashInfer.make()
    except PeerError as error:
        console.print(f"flashinfer is not measured: {error}", markup=False)
        return None, {"not_measured": str(error)}
    about = peer.facts() | {"trial_seconds": round(seconds, 1)}
    console.print(f"flashinfer {about}", style="dim")
    return peer, about


def _records(
    bench: AttentionBench,
    library: KernelLibrary,
    peer: FlashInfer | None,
    result: dict[str, Any],
    console: Console,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row as it is measured, with the list that it belongs to."""
    product, bandwidth = result["product_flops_per_second"], result["copy_bytes_per_second"]
    if bench.prefill:
        prefill_record(library, WARM_TOKENS, product, peer)  # what libraries do once a process
    for tokens in bench.lengths if bench.prefill else ():
        torch.cuda.empty_cache()
        record = prefill_record(library, tokens, product, peer)
        console.print(f"prefill of {tokens} tokens: {record['seconds']:.1f} s", style="dim")
        yield "prefill", record
    torch.cuda.empty_cache()
    for record in attention_decode.records(library, bench.decode_shapes, bandwidth, peer):
        what = f"{record['rows']} x {record['context']}, {record['share']:.0%} of the blocks"
        console.print(f"decode of {what}: {record['seconds']:.1f} s", style="dim")
        yield "decode", record


def _save(result: dict[str, Any], out: Path | None) -> None:
    result["targets"] = judge(result)
    if out is None:
        return
    part = out.with_name(out.name + ".part")
    try:
        part.write_text(json.dumps(result) + "\n")
        part.replace(out)  # a reader, and whoever ends this run, finds it whole
    except OSError as error:
        raise BenchError(f"{out}: {error.strerror}") from None


def _show(result: dict[str, Any], picture: Path | None, console: Console) -> None:
    if result["prefill"]:
        console.print(prefill_table(result["prefill"]))
    if result["decode"]:
        console.print(decode_table(result["decode"]))
    console.print(targets_table(result["targets"]))
    if picture is not None:
        try:
            plot(result, picture)
        except (OSError, ValueError) as error:
            raise BenchError(f"{picture}: {error}") from None
