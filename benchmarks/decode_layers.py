"""What the decode benchmarks run: layers of `benchmarks.attention_layer` with keys of known mass.

Recipe of the keys: of each row's blocks a share is drawn at random for every retrieval head, each
for itself. Index scores in these blocks are 12 + N(0, 0.1), elsewhere N(0, 1), so that they carry
nearly all mass, evenly, and top-p 0.9 keeps nearly all of them; the share kept is reported.
Keys and values themselves are random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

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
from benchmarks.device_times import graph_microseconds
from kernels._launch import KernelLibrary
from kernels.cuda_decode import attend, attend_listed
from kernels.cuda_select import list_blocks
from kernels.decode_inputs import PagedPool, Selection, WindowRule
from kernels.decode_workspace import DecodeWorkspace
from kernels.head_tiles import HeadRole, HeadTiles
from kernels.paged_kv import quantise_index_keys

RULE = WindowRule(WINDOW, SINKS)
SCALE = DIM**-0.5
BYTES_PER_GRAPH = 2**29
MOST_LAYERS = 16
MOST_KV_BYTES = 2**32


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


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers of one shape, each with caches and a workspace of its own.

    There are as many as it takes to move several times the size of the L2 cache: a graph of all of
    them finds nothing of theirs in it, as a model's layers find nothing.
    """

    tiles: HeadTiles
    layers: tuple[Layer, ...]
    spaces: tuple[DecodeWorkspace, ...]

    @classmethod
    def make(cls, library: KernelLibrary, rows: int, context: int, share: float) -> Stack:
        tiles = head_tiles()
        count = min(MOST_LAYERS, BYTES_PER_GRAPH // index_bytes(rows, context))
        # One layer of a long context is more than the L2 cache holds.
        count = max(1, min(count, MOST_KV_BYTES // (rows * context * KV_HEADS * DIM * 4)))
        layers = tuple(Layer.make(rows, context, share, seed) for seed in range(count))
        spaces = tuple(
            DecodeWorkspace(
                library,
                layer.q_RHD.device,
                torch.bfloat16,
                DIM,
                max_rows=rows,
                max_tiles=tiles.count,
                max_selecting=len(RETRIEVAL),
                max_blocks=context // BLOCK,
            )
            for layer in layers
        )
        return cls(tiles, layers, spaces)

    def with_int8_keys(self) -> Stack:
        """The same layers with index keys of 8 bits."""
        return replace(self, layers=tuple(with_int8_keys(layer) for layer in self.layers))

    def of_role(self, *, retrieval: bool) -> Stack:
        """The same layers with the tiles of one role alone; lists are numbered by tile."""
        return replace(self, tiles=tiles_of_role(self.tiles, retrieval=retrieval))

    def microseconds(self, call: Callable[[Stack, Layer, DecodeWorkspace], object]) -> float:
        """Of one layer, when all are replayed in a CUDA graph."""
        pairs = zip(self.layers, self.spaces, strict=True)
        return graph_microseconds([partial(call, self, *pair) for pair in pairs])

    def each(self, call: Callable[[Stack, Layer, DecodeWorkspace], object]) -> None:
        """Call for every layer once."""
        for layer, space in zip(self.layers, self.spaces, strict=True):
            call(self, layer, space)

    def whole(self, layer: Layer, space: DecodeWorkspace) -> None:
        """Both kernels, as the engine starts them."""
        heads, lens = (layer.q_RHD, layer.out_RHD), layer.lens_R
        select = (layer.selection, layer.attended_RS)
        attend(space, self.tiles, *heads, layer.pool, None, lens, RULE, SCALE, *select)

    def select(self, layer: Layer, space: DecodeWorkspace) -> None:
        """`index_select` alone."""
        select = (layer.selection, layer.attended_RS)
        list_blocks(space, self.tiles, layer.pool, layer.lens_R, RULE, *select)

    def attention(self, layer: Layer, space: DecodeWorkspace) -> None:
        """`sparse_decode` alone, with the lists that the workspace holds."""
        heads, lens = (layer.q_RHD, layer.out_RHD), layer.lens_R
        attend_listed(space, self.tiles, *heads, layer.pool, None, lens, RULE, SCALE, 0)


def index_bytes(rows: int, context: int, key_bytes: int = 2 * INDEX_DIM) -> int:
    """Of all index keys of a layer."""
    return rows * context * key_bytes * len(RETRIEVAL)
