"""Sparse prefill of the retrieval heads of `benchmarks.attention_prefill`'s layer, part by part."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.attention_layer import BLOCK, INDEX_DIM, TOP_P
from benchmarks.attention_prefill import PrefillCase
from benchmarks.device_times import milliseconds
from kernels._launch import KernelLibrary
from kernels.cuda_prefill import BlockLists
from kernels.device_sparse_prefill import attend_lists, choose_lists, score_tiles
from kernels.prefill_tiles import PrefillTiles
from kernels.span_inputs import SpanInputs

SHARE = 0.2  # of the blocks before a tile
CHUNK = 2**14  # queries at once, as a server computes a long prompt


class Chunk(NamedTuple):
    """Queries [start, stop) of the prompt, and the blocks that their tiles read."""

    inputs: SpanInputs
    tiles: PrefillTiles
    qi_TGI: Tensor
    lists: BlockLists

    @classmethod
    def make(cls, whole: SpanInputs, qi_TGI: Tensor, start: int, stop: int, share: float) -> Chunk:
        device, heads = qi_TGI.device, qi_TGI.shape[1]
        tiles = PrefillTiles.of_spans([0, stop - start], [stop], device)
        drawn = torch.rand(tiles.count, heads, -(-stop // BLOCK), device=device) < share
        block_B = torch.arange(drawn.shape[2], device=device)
        first_Z1, last_Z1 = (
            (position_Z // BLOCK).unsqueeze(1)
            for position_Z in (tiles.first_position_Z, tiles.last_position_Z)
        )
        forced_ZB = (block_B == 0) | (block_B >= first_Z1 - 1)
        mask_ZGB = (drawn | forced_ZB.unsqueeze(1)) & (block_B <= last_Z1).unsqueeze(1)
        inputs = whole._replace(
            q_THD=whole.q_THD[start:stop],
            out_THD=whole.out_THD[start:stop],
            block_tables_SB=whole.block_tables_SB[:, : drawn.shape[2]],
            query_starts=torch.tensor([0, stop - start], device=device),
            context_lens_S=torch.tensor([stop], device=device),
        )
        return cls(inputs, tiles, qi_TGI[start:stop], BlockLists.of_mask(mask_ZGB))


def sparse_milliseconds(library: KernelLibrary, case: PrefillCase) -> dict[str, float]:
    """Scoring, top-p with lists, and attention to a known share of the blocks, in milliseconds.

    Which blocks are read is drawn at random, so that their share is known and an L2 cache finds
    nothing of it twice by luck; the selection that is timed has an index of its own.
    """
    whole = case.spans_of(case.retrieval_G)
    heads = len(case.retrieval_G)
    shape = (case.k_cache.shape[0], heads, BLOCK, INDEX_DIM)
    index = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    qi = torch.randn(case.tokens, heads, INDEX_DIM, device="cuda", dtype=torch.bfloat16)
    rows = torch.arange(heads, device="cuda")
    top_p = torch.full((heads,), TOP_P, device="cuda")
    found = {"score": 0.0, "select": 0.0, "attend": 0.0}
    for start in range(0, case.tokens, CHUNK):
        chunk = Chunk.make(whole, qi, start, min(start + CHUNK, case.tokens), SHARE)
        tables, nowhere = chunk.inputs.block_tables_SB, chunk.inputs.context_lens_S

        def score(chunk: Chunk = chunk, tables: Tensor = tables) -> Tensor:
            return score_tiles(chunk.qi_TGI, rows, index, tables, chunk.tiles)

        share_ZGB = score()

        def select(
            chunk: Chunk = chunk, share_ZGB: Tensor = share_ZGB, nowhere: Tensor = nowhere
        ) -> None:
            choose_lists(share_ZGB, top_p, chunk.tiles, nowhere, 0, BLOCK)

        def attend(chunk: Chunk = chunk) -> None:
            attend_lists(library, chunk.inputs, chunk.tiles, chunk.lists, case.scale)

        for name, call in (("score", score), ("select", select), ("attend", attend)):
            found[name] += _median(call)
    return found


def _median(call: Callable[[], object]) -> float:
    return statistics.median(milliseconds(call, repeats=3))
