"""Decode attention of one layer: the CUDA kernels beside PyTorch's dense attention, in one run.

    python -m benchmarks.attention_decode > decode.json

Shape: a layer of Qwen3-30B-A3B (32 query heads, 4 KV heads, head_dim 128, bfloat16), window 8192,
4 sinks, blocks of 64, five retrieval heads spread over all KV heads (so every KV head is full).

Recipe of the keys: of each row's blocks a share is drawn at random for every retrieval head, each
for itself. Index scores in these blocks are 12 + N(0, 0.1), elsewhere N(0, 1), so that they carry
nearly all mass, evenly, and top-p 0.9 keeps nearly all of them; the share kept is reported.
Keys and values themselves are random.

Times are medians of CUDA graph replays, per layer. A graph runs as many layers, each with caches of
its own, as it takes to move several times the size of the L2 cache: a model's layers find nothing
of theirs in it either. Index keys are bfloat16, and once more the same in 8 bits ("int8", with a
scale per token: 18 bytes instead of 32). Dense attention is given contiguous keys and values, and
the query heads of a KV head in its fastest form. "floor" is the bytes that must be read by the copy
bandwidth measured in the same run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_layer import (
    BLOCK,
    DIM,
    HEADS,
    INDEX_DIM,
    KV_HEADS,
    RETRIEVAL,
    SINKS,
    TOP_P,
    WINDOW,
)
from benchmarks.hardware import describe_hardware
from kernels._build import default_cache, find_library
from kernels._launch import KernelLibrary
from kernels.cuda_decode import attend, attend_listed, list_blocks
from kernels.decode_inputs import PagedPool, Selection, WindowRule
from kernels.decode_workspace import DecodeWorkspace
from kernels.head_tiles import HeadRole, HeadTiles
from kernels.paged_kv import quantise_index_keys

RULE = WindowRule(WINDOW, SINKS)
SHAPES = ((1, 2**15), (1, 2**17), (1, 2**20), (8, 2**15), (8, 2**17))  # rows, context
SHARES = (0.01, 0.03, 0.1)
BYTES_PER_GRAPH = 2**29
REPLAYS = 30


@dataclass(frozen=True, slots=True)
class Layer:
    """Inputs of one layer's decode step."""

    q_RHD: Tensor
    out_RHD: Tensor
    pool: PagedPool
    lens_R: Tensor
    selection: Selection
    attended_RS: Tensor

    @classmethod
    def make(cls, rows: int, context: int, share: float, seed: int) -> Layer:
        generator = torch.Generator("cuda").manual_seed(seed)
        blocks = context // BLOCK
        pages = torch.randperm(rows * blocks, generator=generator, device="cuda") + 1
        shape = (rows * blocks + 1, KV_HEADS, BLOCK, DIM)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)

        # The query is 4 in its first dimension and 0 elsewhere: the first of a key is score / 4.
        qi_RSI = torch.zeros(rows, len(RETRIEVAL), INDEX_DIM, device="cuda", dtype=torch.bfloat16)
        qi_RSI[..., 0] = 4
        index = random(shape[0], len(RETRIEVAL), BLOCK, INDEX_DIM)
        index[..., 0] /= 4
        hot_PS = torch.rand(*index.shape[:2], generator=generator, device="cuda") < share
        noise = random(*index.shape[:3]) * 0.1
        index[..., 0] = torch.where(hot_PS[..., None], (12 + noise) / 4, index[..., 0])
        return cls(
            q_RHD=random(rows, HEADS, DIM),
            out_RHD=torch.empty(rows, HEADS, DIM, device="cuda", dtype=torch.bfloat16),
            pool=PagedPool(random(*shape), random(*shape), pages.view(rows, blocks)),
            lens_R=torch.full((rows,), context, device="cuda"),
            selection=Selection(
                qi_RSI=qi_RSI,
                index_row_S=torch.arange(len(RETRIEVAL), device="cuda"),
                index_cache=index,
                top_p_S=torch.full((len(RETRIEVAL),), TOP_P, device="cuda"),
            ),
            attended_RS=torch.zeros(rows, len(RETRIEVAL), dtype=torch.int64, device="cuda"),
        )


def with_int8_keys(layer: Layer) -> Layer:
    """The same layer with index keys of 8 bits."""
    keys = layer.selection.index_cache
    steps, scales = quantise_index_keys(keys.flatten(0, 1))
    rounded = replace(
        layer.selection,
        index_cache=steps.view(keys.shape),
        index_scales=scales.view(keys.shape[:3]),
    )
    return replace(layer, selection=rounded)


def head_tiles() -> HeadTiles:
    """Roles of the benchmark's layer, in tiles of their own."""
    roles = [
        HeadRole(
            "full",
            head // (HEADS // KV_HEADS),
            retrieval=head in RETRIEVAL,
            selected=RETRIEVAL.index(head) if head in RETRIEVAL else None,
        )
        for head in range(HEADS)
    ]
    return HeadTiles.make(roles, torch.device("cuda"), split_roles=True)


def tiles_of_role(tiles: HeadTiles, *, retrieval: bool) -> HeadTiles:
    """The tiles of one role alone; what the other heads would write is left as it was."""
    is_it_G = (tiles.groups[:, 3] != 0) == retrieval
    place_G = is_it_G.cumsum(0) - 1
    tile_of_selected_S = place_G[tiles.tile_of_selected_S.long()].int()
    return HeadTiles(tiles.groups[is_it_G], tile_of_selected_S, tiles.num_heads, tiles.most_heads)


def graph_microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one of the calls when all are replayed in a CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(REPLAYS):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 1000 * statistics.median(times) / len(calls)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device-to-device copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-6 * graph_microseconds([lambda: target.copy_(source)]))


def dense_microseconds(rows: int, context: int) -> dict[str, float]:
    """PyTorch's dense attention by backend, the faster of two forms; one that refuses is left out.

    The query heads of a KV head can be passed as its queries, which FlashAttention-2 takes well.
    cuDNN splits the context only for a single query: for it they must be heads that share keys, or
    a context is read by as many CTAs as there are KV heads.
    """
    size = rows * KV_HEADS * context * DIM
    layers = max(1, BYTES_PER_GRAPH // (4 * size))
    shape = (rows, KV_HEADS, context, DIM)
    caches = [
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        for _ in range(layers)
    ]
    q = torch.randn(rows, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    grouped = q.view(rows, KV_HEADS, HEADS // KV_HEADS, DIM)
    attend = scaled_dot_product_attention
    forms = {
        "queries": [partial(attend, grouped, k, v) for k, v in caches],
        "heads": [partial(attend, q, k, v, enable_gqa=True) for k, v in caches],
    }
    found: dict[str, float] = {}
    backends = (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION))
    for name, backend in backends:
        for form, calls in forms.items():
            try:
                with sdpa_kernel(backend):
                    took = graph_microseconds(calls)
            except RuntimeError as error:
                print(f"{name}, group as {form}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            found[name] = min(took, found.get(name, took))
    return found


def blocks_needed(space: DecodeWorkspace, rows: int, context: int, tiles: int) -> int:
    """Blocks of all rows and KV heads that some head attends to, each once."""
    block_RGB = space.lists.view(rows, tiles, context // BLOCK, 2)[..., 0]
    counts_RG1 = space.list_counts.view(rows, tiles, 1)
    listed_RGB = torch.arange(context // BLOCK, device="cuda") < counts_RG1
    first = max(0, context - RULE.window) // BLOCK
    outside_RGB = (block_RGB > 0) & (block_RGB < first)
    window = context // BLOCK - first + (first > 0)
    return int((listed_RGB & outside_RGB).sum()) + rows * KV_HEADS * window


def sparse_figures(
    library: KernelLibrary, rows: int, context: int, share: float, bandwidth: float
) -> dict[str, Any]:
    """Both kernels, each alone and together, with the bytes that they must read.

    Attention also in its parts: local heads alone, and retrieval heads with lists made before.
    """
    tiles, blocks = head_tiles(), context // BLOCK
    layer_bytes = rows * context * INDEX_DIM * 2 * len(RETRIEVAL)
    count = min(16, max(1, BYTES_PER_GRAPH // layer_bytes))
    # Layers of long contexts are large, and one of them is more than the L2 cache holds.
    count = min(count, max(1, 2**32 // (rows * context * KV_HEADS * DIM * 4)))
    layers = [Layer.make(rows, context, share, seed) for seed in range(count)]
    device = layers[0].q_RHD.device
    workspaces = [
        DecodeWorkspace(
            library,
            device,
            torch.bfloat16,
            DIM,
            max_rows=rows,
            max_tiles=tiles.count,
            max_selecting=len(RETRIEVAL),
            max_blocks=blocks,
        )
        for _ in layers
    ]
    scale = DIM**-0.5

    def whole(layer: Layer, space: DecodeWorkspace) -> None:
        attend(
            space,
            tiles,
            layer.q_RHD,
            layer.out_RHD,
            layer.pool,
            None,
            layer.lens_R,
            RULE,
            scale,
            layer.selection,
            layer.attended_RS,
        )

    def select(layer: Layer, space: DecodeWorkspace, of: HeadTiles = tiles) -> None:
        list_blocks(space, of, layer.pool, layer.lens_R, RULE, layer.selection, layer.attended_RS)

    def attention(layer: Layer, space: DecodeWorkspace, of: HeadTiles = tiles) -> None:
        heads = (layer.q_RHD, layer.out_RHD)
        attend_listed(space, of, *heads, layer.pool, None, layer.lens_R, RULE, scale, 0)

    def measure(
        call: Callable[[Layer, DecodeWorkspace], None], on: Sequence[Layer] = layers
    ) -> float:
        pairs = list(zip(on, workspaces, strict=True))
        return graph_microseconds([partial(call, *pair) for pair in pairs])

    both = measure(whole)
    needed = statistics.fmean(blocks_needed(s, rows, context, tiles.count) for s in workspaces)
    index_bytes, kv_bytes = layer_bytes, needed * BLOCK * DIM * 4
    int8_bytes = rows * context * (INDEX_DIM + 2) * len(RETRIEVAL)
    rounded = [with_int8_keys(layer) for layer in layers]
    int8_us, int8_select_us = measure(whole, rounded), measure(select, rounded)
    select_us, attention_us = measure(select), measure(attention)
    local, retrieval = (tiles_of_role(tiles, retrieval=flag) for flag in (False, True))
    local_us = measure(partial(attention, of=local))
    for layer, space in zip(layers, workspaces, strict=True):
        select(layer, space, retrieval)  # lists are numbered by tile
    retrieval_us = measure(partial(attention, of=retrieval))
    attended = [float(layer.attended_RS.float().mean()) for layer in layers]
    return {
        "microseconds": both,
        "select_microseconds": select_us,
        "attention_microseconds": attention_us,
        "local_microseconds": local_us,
        "retrieval_microseconds": retrieval_us,
        "attended_fraction": statistics.fmean(attended) / context,
        "floor_microseconds": 1e6 * (index_bytes + kv_bytes) / bandwidth,
        "select_share_of_copy": index_bytes / (1e-6 * select_us) / bandwidth,
        "attention_share_of_copy": kv_bytes / (1e-6 * attention_us) / bandwidth,
        "int8": {
            "microseconds": int8_us,
            "select_microseconds": int8_select_us,
            "select_share_of_copy": int8_bytes / (1e-6 * int8_select_us) / bandwidth,
            "floor_microseconds": 1e6 * (int8_bytes + kv_bytes) / bandwidth,
        },
    }


def run(shapes: Sequence[tuple[int, int]] = SHAPES) -> dict[str, Any]:
    """All shares at each (rows, context); the figures as one JSON object."""
    library = KernelLibrary(find_library(default_cache()))
    bandwidth = copy_bandwidth()
    console = Console(stderr=True, width=160)  # the table, where nobody has a terminal either
    records = []
    for rows, context in track(shapes, "decode attention", console=console, transient=True):
        dense = dense_microseconds(rows, context)
        for share in SHARES:
            torch.cuda.empty_cache()
            sparse = sparse_figures(library, rows, context, share, bandwidth)
            fastest, int8_us = min(dense.values()), sparse["int8"]["microseconds"]
            records.append(
                {"rows": rows, "context": context, "share": share, "dense": dense}
                | {"sparse": sparse, "ratio": fastest / sparse["microseconds"]}
                | {"int8_ratio": fastest / int8_us}
            )
    console.print(_table(records))
    return {
        "benchmark": "attention_decode",
        "hardware": describe_hardware(),
        "copy_bytes_per_second": bandwidth,
        "records": records,
    }


def _table(records: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="decode attention of one layer, microseconds")
    columns = "rows x context|share|dense|sparse|ratio|select|of copy|attention|of copy"
    int8_columns = ("int8", "ratio", "select", "of copy")
    for column in (*columns.split("|"), "local", "retrieval", "floor", *int8_columns):
        table.add_column(column, justify="right")
    for record in records:
        sparse, best = record["sparse"], min(record["dense"], key=record["dense"].get)
        int8 = sparse["int8"]
        table.add_row(
            f"{record['rows']} x {record['context'] // 1024}K",
            f"{sparse['attended_fraction']:.1%}",
            f"{record['dense'][best]:.1f} {best}",
            f"{sparse['microseconds']:.1f}",
            f"{record['ratio']:.2f}x",
            f"{sparse['select_microseconds']:.1f}",
            f"{sparse['select_share_of_copy']:.0%}",
            f"{sparse['attention_microseconds']:.1f}",
            f"{sparse['attention_share_of_copy']:.0%}",
            f"{sparse['local_microseconds']:.1f}",
            f"{sparse['retrieval_microseconds']:.1f}",
            f"{sparse['floor_microseconds']:.1f}",
            f"{int8['microseconds']:.1f}",
            f"{record['int8_ratio']:.2f}x",
            f"{int8['select_microseconds']:.1f}",
            f"{int8['select_share_of_copy']:.0%}",
        )
    return table


if __name__ == "__main__":
    print(json.dumps(run()))
