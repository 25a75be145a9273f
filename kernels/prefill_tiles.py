"""Queries of prefill spans in tiles: what sparse prefill selects blocks for.

Tiles begin with their span, so where a prompt is cut into chunks at other places than multiples of
a tile, other queries choose together. The same for every layer of a step.

Shapes: T queries, S spans, Z tiles, Q sampled queries of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_QUERIES = 128
SAMPLED = 16  # queries of a tile that score blocks: its every eighth, and the last of a short one
MAX_MASSES = 2**28  # masses of blocks that a GPU holds at once: 1 GiB


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """Z tiles in the order of their spans; all tensors int64 and contiguous."""

    span_Z: Tensor
    begin_Z: Tensor  # rows [begin, end) among the T queries
    end_Z: Tensor
    first_position_Z: Tensor
    last_position_Z: Tensor
    sampled_ZQ: Tensor  # rows; a short tile repeats its last one
    position_T: Tensor

    @classmethod
    def of_spans(
        cls, starts: Sequence[int], contexts: Sequence[int], device: torch.device | None = None
    ) -> PrefillTiles:
        """
        Args:
            starts: offsets of the S spans among the queries, and their end.
            contexts: position of each span's last query + 1.
        """
        tiles = [
            (span, begin, min(begin + TILE_QUERIES, starts[span + 1]))
            for span in range(len(contexts))
            for begin in range(starts[span], starts[span + 1], TILE_QUERIES)
        ]
        columns = torch.tensor(tiles, dtype=torch.int64).view(-1, 3).T.contiguous()
        span_Z, begin_Z, end_Z = columns.to(device)
        shift = [context - end for context, end in zip(contexts, starts[1:], strict=True)]
        shift_Z = torch.tensor(shift, dtype=torch.int64, device=device)[span_Z]
        rows_T = torch.arange(starts[-1], device=device)
        stride = TILE_QUERIES // SAMPLED
        offsets_Q = torch.arange(stride - 1, TILE_QUERIES, stride, device=device)
        return cls(
            span_Z=span_Z,
            begin_Z=begin_Z,
            end_Z=end_Z,
            first_position_Z=begin_Z + shift_Z,
            last_position_Z=end_Z - 1 + shift_Z,
            sampled_ZQ=torch.minimum(begin_Z[:, None] + offsets_Q, end_Z[:, None] - 1),
            position_T=rows_T + torch.repeat_interleave(shift_Z, end_Z - begin_Z),
        )

    @property
    def count(self) -> int:
        return self.span_Z.shape[0]
