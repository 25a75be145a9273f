"""Prefill attention of one layer: inputs and work; `rtpurbo bench attention` prints the times.

The layer is that of `benchmarks.attention_layer`. One whole prompt, no chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention_layer import BLOCK, DIM, HEADS, KV_HEADS, RETRIEVAL, SINKS
from kernels.span_inputs import SpanInputs


@dataclass(frozen=True, slots=True)
class PrefillCase:
    """One layer's queries and pages, in random order as a server's are after a while."""

    q_THD: Tensor
    out_THD: Tensor
    k_cache: Tensor
    v_cache: Tensor
    tables_SB: Tensor
    starts: Tensor
    lens_S: Tensor
    retrieval_G: Tensor
    local_G: Tensor
    sinks: int = SINKS

    @classmethod
    def make(cls, tokens: int, *, dim: int = DIM, seed: int = 0) -> PrefillCase:
        generator = torch.Generator("cuda").manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        def ints(*values: int) -> Tensor:
            return torch.tensor(values, device="cuda")

        blocks = -(-tokens // BLOCK)
        pages = torch.randperm(blocks, generator=generator, device="cuda") + 1
        cache = (blocks + 1, KV_HEADS, BLOCK, dim)
        q_THD = random(tokens, HEADS, dim)
        return cls(
            q_THD=q_THD,
            out_THD=torch.empty_like(q_THD),
            k_cache=random(*cache),
            v_cache=random(*cache),
            tables_SB=pages.view(1, blocks),
            starts=ints(0, tokens),
            lens_S=ints(tokens),
            retrieval_G=ints(*RETRIEVAL),
            local_G=ints(*(head for head in range(HEADS) if head not in RETRIEVAL)),
        )

    @property
    def tokens(self) -> int:
        return self.q_THD.shape[0]

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q_THD.shape[2])

    def spans_of(self, heads_G: Tensor) -> SpanInputs:
        """These heads, as the kernels take them."""
        kv_row_G = heads_G // (HEADS // KV_HEADS)
        caches = (self.k_cache, self.v_cache, self.tables_SB)
        heads = (self.q_THD, self.out_THD, heads_G, kv_row_G)
        return SpanInputs(*heads, *caches, self.starts, self.lens_S)

    def flops(self, heads: int, window: int | None = None) -> float:
        """Of both products over the pairs that are not masked; sinks outside the window count."""
        return 4.0 * self.q_THD.shape[2] * heads * attended_pairs(self.tokens, window, self.sinks)


def attended_pairs(tokens: int, window: int | None, sinks: int) -> int:
    """Pairs of a query and a key that it sees, of a whole prompt."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    late = tokens - window
    far = sum(min(sinks, gone) for gone in range(1, min(late, sinks) + 1))
    far += max(0, late - sinks) * sinks
    return window * (window + 1) // 2 + late * window + far
