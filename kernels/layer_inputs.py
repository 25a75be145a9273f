"""What the kernels around attention take; each has a twin in `kernels.layer_reference`.

Shapes: T tokens, H query heads, N KV heads, D head_dim, P pages of a pool, K tokens of a page,
X rows of index keys, S heads that select, I index_dim, Q tokens whose index queries are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm of every query and key head; `weight_2D` is the queries' [D], then the keys'."""

    weight_2D: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class StoredPool:
    """Pages [P, N of the pool, K, D] of keys and values, and where each token goes in them.

    slots_T: int64, page * K + place in the page.
    """

    k_cache: Tensor
    v_cache: Tensor
    slots_T: Tensor


@dataclass(frozen=True, slots=True)
class IndexProjections:
    """From heads before RoPE to the index space.

    k_proj_XID, q_proj_SID: in the dtype of the heads; I a multiple of 8, at most D / 2.
    k_head_X, q_head_S: int64, the KV or query head that each row is made from.
    index_cache: [P, X, K, I] with the full pool's pages; None: the keys are handed back.
    query_tokens: Q, the first of the T.
    index_scales: bfloat16 [P, X, K] of a cache of int8.
    """

    k_proj_XID: Tensor
    k_head_X: Tensor
    q_proj_SID: Tensor
    q_head_S: Tensor
    index_cache: Tensor | None
    query_tokens: int
    index_scales: Tensor | None = None


class StoredQkv(NamedTuple):
    """What `store_qkv` leaves beside the pages."""

    q_THD: Tensor  # after RoPE
    qi_QSI: Tensor | None  # index queries; None without an index
    ki_TXI: Tensor | None  # index keys that were not stored

    def by_name(
        self, full: StoredPool | None, window: StoredPool | None, index: IndexProjections | None
    ) -> dict[str, Tensor]:
        """This and what the call wrote to the pages that it was given."""
        found = {name: value for name, value in self._asdict().items() if value is not None}
        for name, pool in (("full", full), ("window", window)):
            if pool is not None:
                found |= {f"{name} keys": pool.k_cache, f"{name} values": pool.v_cache}
        if index is not None and index.index_cache is not None:
            found["index keys"] = index.index_cache
            if index.index_scales is not None:
                found["index scales"] = index.index_scales
        return found
