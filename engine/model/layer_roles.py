"""Which query heads of a layer have which role, as tensors on the device.

Shapes: T tokens, H query heads, N KV heads, D head_dim, X rows of index keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.head_layout import LayerHeads


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """Query heads of one role in one layer: their indices, and their KV heads' cache rows."""

    heads_H: Tensor
    kv_row_H: Tensor
    is_whole: bool  # all heads of the layer, in order: nothing to pick out

    def pick(self, x_THD: Tensor) -> Tensor:
        """The group's heads."""
        return x_THD if self.is_whole else x_THD[:, self.heads_H]

    def place(self, value_THD: Tensor, out_THD: Tensor) -> None:
        """Put the group's heads back."""
        if self.is_whole:
            out_THD.copy_(value_THD)
        else:
            out_THD[:, self.heads_H] = value_THD


@dataclass(frozen=True, slots=True)
class LayerRoles:
    """`LayerHeads` as tensors on the device."""

    full_kv_N: Tensor
    windowed_kv_N: Tensor
    retrieval: HeadGroup
    local_on_full: HeadGroup
    local_on_windowed: HeadGroup
    index_head_X: Tensor  # the KV head that each row of index keys is made from
    index_row_H: Tensor  # row of index keys of each retrieval head
    top_p_H: Tensor  # float32, the checkpoint's value per retrieval head

    @classmethod
    def make(cls, heads: LayerHeads, group_size: int, device: torch.device) -> LayerRoles:
        def ints(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        total = sum(map(len, (heads.retrieval, heads.local_on_full, heads.local_on_windowed)))

        def group(members: Sequence[int], kv_rows: Sequence[int]) -> HeadGroup:
            return HeadGroup(ints(members), ints(kv_rows), len(members) == total)

        per_head = heads.index_rows == len(heads.retrieval)
        index_heads = [h // group_size for h in heads.retrieval] if per_head else heads.full_kv
        return cls(
            full_kv_N=ints(heads.full_kv),
            windowed_kv_N=ints(heads.windowed_kv),
            retrieval=group(heads.retrieval, heads.retrieval_kv_row),
            local_on_full=group(heads.local_on_full, heads.local_on_full_kv_row),
            local_on_windowed=group(heads.local_on_windowed, heads.local_on_windowed_kv_row),
            index_head_X=ints(index_heads if heads.has_indexer else ()),
            index_row_H=ints(heads.index_row),
            top_p_H=torch.tensor(heads.top_p, dtype=torch.float32, device=device),
        )
