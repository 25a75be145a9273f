"""The projections of an indexer while they are made: float32, group by group.

Shapes: T tokens, D head_dim, I index_dim, R sampled rows, G query heads that share a key
projection (one with index scope query_head, all retrieval heads of a KV head with kv_head).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conversion.document_attention import LayerView, hide_future
from engine.model.config import ModelConfig
from engine.model.decoder import Indexer
from engine.model.head_layout import layer_heads


@dataclass(frozen=True, slots=True)
class IndexGroup:
    """Query heads of one layer that share one key projection."""

    layer: int
    kv_head: int
    heads: tuple[int, ...]

    @property
    def places(self) -> list[tuple[int, int]]:
        """(layer, head) of its heads."""
        return [(self.layer, head) for head in self.heads]


def index_groups(config: ModelConfig) -> tuple[IndexGroup, ...]:
    """Groups in the order of the rows of k_proj: per retrieval head, or per full KV head."""
    assert config.sparse is not None
    groups = []
    for layer in range(config.num_layers):
        heads = layer_heads(config, layer)
        sets: list[tuple[int, ...]] = [(head,) for head in heads.retrieval]
        if config.sparse.index_scope == "kv_head":
            size = config.group_size
            sets = [tuple(h for h in heads.retrieval if h // size == kv) for kv in heads.full_kv]
        groups += [IndexGroup(layer, heads[0] // config.group_size, heads) for heads in sets]
    return tuple(groups)


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """W_Q and W_K of one group."""

    group: IndexGroup
    w_q_GID: Tensor
    w_k_ID: Tensor

    def scores(self, place: int, view: LayerView, rows_R: Tensor) -> Tensor:
        """Index scores [R, T] of the head at `place` of the group, -inf past each row's position.

        Differentiable in the weights.
        """
        q_RI = view.q_pre_THD[rows_R, self.group.heads[place]].float() @ self.w_q_GID[place].T
        k_TI = view.k_pre_TND[:, self.group.kv_head].float() @ self.w_k_ID.T
        return hide_future(q_RI @ k_TI.T, rows_R)


@dataclass(frozen=True, slots=True)
class IndexWeights:
    """The projections of all groups."""

    groups: tuple[GroupWeights, ...]

    def of_layer(self, layer: int) -> list[tuple[int, GroupWeights]]:
        """The groups of one layer with their numbers among all."""
        return [pair for pair in enumerate(self.groups) if pair[1].group.layer == layer]

    def parameters(self) -> list[Tensor]:
        """W_Q and W_K of every group in turn."""
        return [weight for group in self.groups for weight in (group.w_q_GID, group.w_k_ID)]

    def copied(self, device: torch.device, *, trained: bool = False) -> IndexWeights:
        """The same values, float32, in memory of their own; `trained`: they take gradients."""

        def copy(weight: Tensor) -> Tensor:
            own = weight.detach().to(device, torch.float32, copy=True)
            return own.requires_grad_(trained)

        return IndexWeights(
            tuple(GroupWeights(g.group, copy(g.w_q_GID), copy(g.w_k_ID)) for g in self.groups)
        )

    def scaled(self, temperatures: Mapping[tuple[int, int], float]) -> IndexWeights:
        """W_Q of every head times its temperature, given by (layer, head)."""
        groups = []
        for group in self.groups:
            factors = [temperatures[place] for place in group.group.places]
            factor_G11 = group.w_q_GID.new_tensor(factors).view(-1, 1, 1)
            groups.append(GroupWeights(group.group, group.w_q_GID * factor_G11, group.w_k_ID))
        return IndexWeights(tuple(groups))

    def indexers(self, layers: int) -> list[Indexer | None]:
        """Per layer, float32 on the CPU, in the layout of indexer.safetensors."""
        made: list[Indexer | None] = []
        for layer in range(layers):
            groups = [group for _, group in self.of_layer(layer)]
            made.append(
                Indexer(
                    q_proj_HID=torch.cat([group.w_q_GID for group in groups]).detach().cpu(),
                    k_proj_HID=torch.stack([group.w_k_ID for group in groups]).detach().cpu(),
                )
                if groups
                else None
            )
        return made

    @classmethod
    def of_indexers(
        cls, groups: Sequence[IndexGroup], indexers: Sequence[Indexer | None]
    ) -> IndexWeights:
        """What `indexers` gave, for the same groups."""
        made = []
        taken: dict[int, tuple[int, int]] = {}  # rows of W_Q and W_K used, by layer
        for group in groups:
            indexer = indexers[group.layer]
            assert indexer is not None
            row_q, row_k = taken.get(group.layer, (0, 0))
            end = row_q + len(group.heads)
            made.append(
                GroupWeights(group, indexer.q_proj_HID[row_q:end], indexer.k_proj_HID[row_k])
            )
            taken[group.layer] = (end, row_k + 1)
        return cls(tuple(made))
