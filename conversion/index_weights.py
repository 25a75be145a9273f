"""The projections of an indexer, and its biases for ages, while they are made: float32, by group.

Shapes: T tokens, D head_dim, I index_dim, A = AGE_RANGES, R sampled rows, G query heads that share
a key projection (one with index scope query_head, all retrieval heads of a KV head with kv_head).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from conversion.age_bias import settled, with_age_bias
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
    """W_Q and W_K of one group, and the biases of its heads."""

    group: IndexGroup
    w_q_GID: Tensor
    w_k_ID: Tensor
    age_bias_GA: Tensor | None = None  # None: the index does not know ages

    @property
    def parameters(self) -> list[Tensor]:
        """All that there are."""
        return [x for x in (self.w_q_GID, self.w_k_ID, self.age_bias_GA) if x is not None]

    def part(self, rows: Sequence[int]) -> GroupWeights:
        """Some of its heads."""
        heads, bias_GA = self.group.heads, self.age_bias_GA
        return GroupWeights(
            replace(self.group, heads=tuple(heads[row] for row in rows)),
            self.w_q_GID[rows],
            self.w_k_ID,
            None if bias_GA is None else bias_GA[rows],
        )

    def scores(self, place: int, view: LayerView, rows_R: Tensor, block_tokens: int) -> Tensor:
        """Index scores [R, T] of the head at `place` of the group, -inf past each row's position.

        Differentiable in the weights.
        """
        q_RI = view.q_pre_THD[rows_R, self.group.heads[place]].float() @ self.w_q_GID[place].T
        k_TI = view.k_pre_TND[:, self.group.kv_head].float() @ self.w_k_ID.T
        if self.age_bias_GA is None:
            return hide_future(q_RI @ k_TI.T, rows_R)
        k_WI = pad(k_TI, (0, 0, 0, -len(k_TI) % block_tokens))
        scores_RW = hide_future(q_RI @ k_WI.T, rows_R)
        return with_age_bias(scores_RW, self.age_bias_GA[place], rows_R, block_tokens)[
            :, : len(k_TI)
        ]


@dataclass(frozen=True, slots=True)
class IndexWeights:
    """The weights of all groups; all have biases, or none has."""

    groups: tuple[GroupWeights, ...]

    def of_layer(self, layer: int) -> list[tuple[int, GroupWeights]]:
        """The groups of one layer with their numbers among all."""
        return [pair for pair in enumerate(self.groups) if pair[1].group.layer == layer]

    def projections(self) -> list[Tensor]:
        """W_Q and W_K of every group in turn."""
        return [weight for group in self.groups for weight in (group.w_q_GID, group.w_k_ID)]

    def age_biases(self) -> list[Tensor]:
        """Of every group in turn; empty if there are none."""
        return [g.age_bias_GA for g in self.groups if g.age_bias_GA is not None]

    def age_bias_by_place(self) -> dict[tuple[int, int], tuple[float, ...]]:
        """By (layer, head), of heads that have one."""
        return {
            place: tuple(bias)
            for group in self.groups
            if group.age_bias_GA is not None
            for place, bias in zip(group.group.places, group.age_bias_GA.tolist(), strict=True)
        }

    def parameters(self) -> list[Tensor]:
        """Projections, then biases."""
        return self.projections() + self.age_biases()

    def copied(self, device: torch.device, *, trained: bool = False) -> IndexWeights:
        """The same values, float32, in memory of their own; `trained`: they take gradients."""

        def copy(weight: Tensor) -> Tensor:
            own = weight.detach().to(device, torch.float32, copy=True)
            return own.requires_grad_(trained)

        return IndexWeights(
            tuple(
                GroupWeights(g.group, *(copy(weight) for weight in g.parameters))
                for g in self.groups
            )
        )

    def scaled(self, temperatures: Mapping[tuple[int, int], float]) -> IndexWeights:
        """All scores of every head times its temperature, given by (layer, head): W_Q and bias."""
        groups = []
        for group in self.groups:
            factors = [temperatures[place] for place in group.group.places]
            factor_G1 = group.w_q_GID.new_tensor(factors)[:, None]
            bias_GA = group.age_bias_GA
            groups.append(
                replace(
                    group,
                    w_q_GID=group.w_q_GID * factor_G1[..., None],
                    age_bias_GA=None if bias_GA is None else bias_GA * factor_G1,
                )
            )
        return IndexWeights(tuple(groups))

    def settled(self, last: int) -> IndexWeights:
        """With biases that are 0 in the range `last` and past it, see `age_bias.settled`."""
        biases = self.age_biases()
        return self.with_age_biases(settled(torch.cat(biases), last) if biases else None)

    def with_age_biases(self, biases_HA: Tensor | None) -> IndexWeights:
        """The same projections with the biases of all heads, in the order of the groups."""
        if biases_HA is None:
            return IndexWeights(tuple(replace(group, age_bias_GA=None) for group in self.groups))
        parts = torch.split(biases_HA, [len(group.group.heads) for group in self.groups])
        pairs = zip(self.groups, parts, strict=True)
        return IndexWeights(tuple(replace(group, age_bias_GA=part) for group, part in pairs))

    def indexers(self, layers: int) -> list[Indexer | None]:
        """Per layer, float32 on the CPU, in the layout of indexer.safetensors."""
        made: list[Indexer | None] = []
        for layer in range(layers):
            groups = [group for _, group in self.of_layer(layer)]
            made.append(
                Indexer(
                    q_proj_HID=torch.cat([group.w_q_GID for group in groups]).detach().cpu(),
                    k_proj_HID=torch.stack([group.w_k_ID for group in groups]).detach().cpu(),
                    age_bias_HA=_joined([group.age_bias_GA for group in groups]),
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
            bias_HA = indexer.age_bias_HA
            made.append(
                GroupWeights(
                    group,
                    indexer.q_proj_HID[row_q:end],
                    indexer.k_proj_HID[row_k],
                    None if bias_HA is None else bias_HA[row_q:end],
                )
            )
            taken[group.layer] = (end, row_k + 1)
        return cls(tuple(made))


def _joined(biases: Sequence[Tensor | None]) -> Tensor | None:
    """Of all heads of a layer, on the CPU."""
    there = [bias_GA for bias_GA in biases if bias_GA is not None]
    return torch.cat(there).detach().cpu() if there else None
