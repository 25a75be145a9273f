"""Layers of the sparse student as its attention needs them, the same from batch to batch.

Shapes, with those of `conversion.student_attention`:

    H query heads, I index_dim, X rows of index keys, F tokens of a fold, S sink slots
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.config import ModelConfig, SparseAttentionConfig
from engine.model.decoder import Indexer
from engine.model.head_layout import layer_heads

SINK_ALIGNMENT = 8  # keys; fused attention kernels want mask rows of whole 16-byte words


@dataclass(frozen=True, slots=True)
class HeadSets:
    """Head roles of one layer, and how its index keys belong to them."""

    far: tuple[int, ...]  # retrieval heads
    near: tuple[int, ...]  # local heads
    far_H: Tensor  # `far` on the device
    index_head_X: Tensor  # the KV head that each row of index keys is made from
    index_row_H: Tensor  # row of index keys of each retrieval head
    top_p_H: Tensor  # float32, per retrieval head

    @classmethod
    def make(cls, config: ModelConfig, layer: int, device: torch.device) -> HeadSets:
        heads = layer_heads(config, layer)
        per_head = heads.index_rows == len(heads.retrieval)
        own_kv = tuple(head // config.group_size for head in heads.retrieval)

        def ints(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            far=heads.retrieval,
            near=tuple(sorted(heads.local_on_full + heads.local_on_windowed)),
            far_H=ints(heads.retrieval),
            index_head_X=ints((own_kv if per_head else heads.full_kv) if heads.has_indexer else ()),
            index_row_H=ints(heads.index_row),
            top_p_H=torch.tensor(heads.top_p, dtype=torch.float32, device=device),
        )


class StudentLayers:
    """What stays the same from batch to batch: roles, frozen projections, window masks.

    `config.sparse` None is the dense teacher: every head is then a retrieval head that sees all.
    """

    def __init__(
        self,
        config: ModelConfig,
        indexers: Sequence[Indexer | None],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`dtype` is what the model computes in; projections are rounded to it, as served;
        biases for ages stay float32."""
        self.config = config
        self.sparse = config.sparse or _dense(config)
        self.device = device
        self.heads = [HeadSets.make(config, layer, device) for layer in range(config.num_layers)]
        self.indexers = [indexer and _frozen(indexer, device, dtype) for indexer in indexers]
        self._masks: dict[int, Tensor] = {}

    @property
    def fold(self) -> int:
        """Tokens of a folded block: a query sees no further than the block before its own."""
        return max(self.sparse.window_tokens, self.sparse.sink_tokens)

    @property
    def sink_slots(self) -> int:
        """Keys set aside for the sinks; those past them are masked."""
        return self.sparse.sink_tokens + -self.sparse.sink_tokens % SINK_ALIGNMENT

    def window_mask(self, block: int) -> Tensor:
        """What queries of a folded block see, bool [F, 2 F + S]; the same from block 2 on.

        Keys are the block before, the block itself, and the sinks where they have left the window.
        """
        block = min(block, 2)
        if block not in self._masks:
            window, sinks, fold = self.sparse.window_tokens, self.sparse.sink_tokens, self.fold
            query_F1 = torch.arange(fold, device=self.device)[:, None] + block * fold
            near = torch.arange(2 * fold, device=self.device) + (block - 1) * fold
            far = torch.arange(self.sink_slots, device=self.device)
            seen_near = (near >= 0) & (near <= query_F1) & (query_F1 - near < window)
            seen_far = (far < sinks) & (query_F1 - far >= window)
            self._masks[block] = torch.cat([seen_near, seen_far], dim=1)
        return self._masks[block]


def _dense(config: ModelConfig) -> SparseAttentionConfig:
    """Every head a retrieval head."""
    every = tuple(range(config.num_heads))
    return SparseAttentionConfig(retrieval_heads=(every,) * config.num_layers, index_dim=None)


def _frozen(indexer: Indexer, device: torch.device, dtype: torch.dtype) -> Indexer:
    bias_HA = indexer.age_bias_HA
    return Indexer(
        q_proj_HID=indexer.q_proj_HID.detach().to(device, dtype),
        k_proj_HID=indexer.k_proj_HID.detach().to(device, dtype),
        age_bias_HA=None if bias_HA is None else bias_HA.detach().to(device, torch.float32),
    )
