"""What every prefill kernel of a GPU is given: some heads of a layer, and their pages.

Shapes: T query tokens, H query heads of the layer, G of the call, S spans, the others as in
`kernels.reference`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kernels._checks import check_shapes

EVERYTHING = 2**30  # a window that no context reaches: causal attention


class SpanInputs(NamedTuple):
    """Queries of some heads and the caches that they read, on one device.

    Span s has the queries [query_starts[s], query_starts[s + 1]); its last one stands at position
    context_lens_S[s] - 1, and its own keys and values are stored already.
    """

    q_THD: Tensor  # after RoPE, all heads of the layer; the last dimension is contiguous
    out_THD: Tensor  # written in place for the heads of the call; the others stay
    heads_G: Tensor  # int, the heads of the call
    kv_row_G: Tensor  # int, row of each one's KV head in the caches
    k_cache: Tensor  # contiguous [P, N, K, D]
    v_cache: Tensor
    block_tables_SB: Tensor  # int32 or int64 pages by logical block
    query_starts: Tensor  # int32 or int64 [S + 1]
    context_lens_S: Tensor  # int32 or int64

    def check(self) -> None:
        """
        Raises:
            ValueError: shapes that do not fit.
        """
        check_shapes(
            {"S+1": self.context_lens_S.shape[0] + 1},
            q=(self.q_THD, "T H D"),
            out=(self.out_THD, "T H D"),
            heads=(self.heads_G, "G"),
            kv_row=(self.kv_row_G, "G"),
            k_cache=(self.k_cache, "P N K D"),
            v_cache=(self.v_cache, "P N K D"),
            block_tables=(self.block_tables_SB, "S B"),
            query_starts=(self.query_starts, "S+1"),
            context_lens=(self.context_lens_S, "S"),
        )
