"""Queries of a layer, of all or some of its tokens, on their way to attention.

Shapes: T tokens, H query heads, D head_dim, S heads that select, I index_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kernels.indexer import project_index

if TYPE_CHECKING:
    from engine.model.decoder import Indexer


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries after RoPE, and either before it or in the index space already."""

    rotated_THD: Tensor
    before_rope_THD: Tensor | None = None
    index_TSI: Tensor | None = None

    def take(self, part: slice) -> Queries:
        """Those of some tokens."""
        before, index = self.before_rope_THD, self.index_TSI
        return Queries(
            self.rotated_THD[part],
            None if before is None else before[part],
            None if index is None else index[part],
        )

    def in_index_space(self, indexer: Indexer, heads_S: Tensor) -> Tensor:
        """[T, S, I] of the heads that select, projected now if nobody has done it."""
        if self.index_TSI is not None:
            return self.index_TSI
        assert self.before_rope_THD is not None
        return project_index(self.before_rope_THD, indexer.q_proj_HID, heads_S)
