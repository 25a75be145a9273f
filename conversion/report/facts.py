"""What a report tells of a converted model, as plain data; what was not measured is None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from conversion.evaluation.kv_cost import BFLOAT16_BYTES, kv_bytes_per_token
from conversion.head_roles import Scores
from conversion.index_quality import IndexQuality
from conversion.indexer_fit import CurvePoint, HeadSetting
from conversion.stop_rule import Gap
from engine.model.checkpoint import Checkpoint
from engine.model.config import ModelConfig
from engine.model.head_layout import model_heads
from engine.model.kv_bytes import page_bytes

SHORTEST_CONTEXT = 1024  # tokens, of the table of KV bytes


@dataclass(frozen=True, slots=True)
class KvCost:
    """KV memory of one sequence per token of it, in bfloat16, index keys included."""

    length: int  # tokens
    dense_bytes: int
    sparse_bytes: int  # with the windows of the local heads


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The converted folder."""

    name: str
    source: str | None  # name of the folder that was converted
    sha256: str  # of the converted folder, see `conversion.state.model_digest`
    source_sha256: str | None
    family: str
    layers: int
    query_heads: int  # per layer
    kv_heads: int  # per layer
    max_position_embeddings: int  # tokens
    weight_bytes: int
    retrieval_heads: tuple[tuple[int, ...], ...]  # per layer
    full_kv_heads: tuple[tuple[int, ...], ...]  # per layer: KV heads that keep the whole context
    window_tokens: int
    sink_tokens: int
    index_dim: int | None  # None: retrieval heads decode densely
    index_scope: str
    block_tokens: int
    dense_below: int
    kv_growth_bytes: int  # of one more token of context, in bfloat16
    kv_growth_bytes_dense: int
    kv_costs: tuple[KvCost, ...]

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, sha256: str, source: str | None, source_sha256: str | None
    ) -> ModelFacts:
        """
        Args:
            checkpoint: with a sparse section.
        """
        config, sparse = checkpoint.config, checkpoint.config.sparse
        assert sparse is not None
        return cls(
            name=checkpoint.folder.resolve().name,
            source=source,
            sha256=sha256,
            source_sha256=source_sha256,
            family=config.family,
            layers=config.num_layers,
            query_heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            weight_bytes=checkpoint.weight_bytes,
            retrieval_heads=sparse.retrieval_heads,
            full_kv_heads=tuple(layer.full_kv for layer in model_heads(config)),
            window_tokens=sparse.window_tokens,
            sink_tokens=sparse.sink_tokens,
            index_dim=sparse.index_dim,
            index_scope=sparse.index_scope,
            block_tokens=sparse.block_tokens,
            dense_below=sparse.dense_below,
            kv_growth_bytes=_growth(config),
            kv_growth_bytes_dense=_growth(replace(config, sparse=None)),
            kv_costs=tuple(_costs(config)),
        )

    @property
    def kept(self) -> int:
        """Retrieval heads of all layers."""
        return sum(map(len, self.retrieval_heads))

    @property
    def kept_kv(self) -> int:
        """KV heads of all layers that keep the whole context."""
        return sum(map(len, self.full_kv_heads))


@dataclass(frozen=True, slots=True)
class HeadScores:
    """Needle scores of all heads, [layer][query head], and how they were taken."""

    scores: Scores  # means over documents
    scores_deviation: Scores | None = None
    scores_least: Scores | None = None
    scores_most: Scores | None = None
    scores_by_length: Mapping[str, Scores] | None = None
    chosen_by: Mapping[str, Any] | None = None
    text: str | None = None
    documents: int | None = None  # of each length
    lengths: tuple[int, ...] = ()  # tokens
    needle_tokens: int | None = None
    causal_check: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class IndexedHead:
    """How well one head's index selects, on text unseen by the fit."""

    layer: int
    head: int
    setting: HeadSetting
    anywhere: IndexQuality  # queries at any position
    answers: IndexQuality  # queries at needles and answers
    closed_form: CurvePoint  # the same before training
    curve: tuple[CurvePoint, ...] = ()
    age_bias: tuple[float, ...] | None = None  # nats by range of ages, see `kernels.block_age`


@dataclass(frozen=True, slots=True)
class IndexerFacts:
    """The fit, stage 1."""

    heads: tuple[IndexedHead, ...]
    made: str | None = None
    losses: tuple[float, ...] = ()  # per step, nats per query, mean over heads

    def mean(self, queries: str, closed_form: bool = False) -> IndexQuality:
        """Over the heads.

        Args:
            queries: "anywhere" or "answers".
        """
        own = [
            getattr(head.closed_form if closed_form else head, queries).values()
            for head in self.heads
        ]
        return IndexQuality.from_values([fmean(column) for column in zip(*own, strict=True)])

    @property
    def has_age_bias(self) -> bool:
        """Whether the heads have biases by range of ages: all have, or none has."""
        return any(head.age_bias for head in self.heads)

    def mean_curve(self, queries: str) -> list[tuple[float, IndexQuality]]:
        """By top_p, over the heads; empty where the points are not known."""
        found: dict[float, list[Sequence[float]]] = {}
        for head in self.heads:
            for point in head.curve:
                found.setdefault(point.top_p, []).append(getattr(point, queries).values())
        return [
            (top_p, IndexQuality.from_values([fmean(column) for column in zip(*own, strict=True)]))
            for top_p, own in sorted(found.items())
        ]


@dataclass(frozen=True, slots=True)
class DistilFacts:
    """Stage 2."""

    stopped: str
    steps: int
    best: Gap
    before: Gap
    validations: tuple[Gap, ...] = ()
    losses: tuple[float, ...] = ()  # per step, nats per response token
    options: Mapping[str, Any] | None = None


def _growth(config: ModelConfig) -> int:
    """Of the pool that grows with the context."""
    return page_bytes(config, BFLOAT16_BYTES, block_tokens=1)[0]


def _costs(config: ModelConfig) -> list[KvCost]:
    """At powers of two up to the longest context, and there."""
    longest = config.max_position_embeddings
    lengths = [SHORTEST_CONTEXT << power for power in range(longest.bit_length())]
    lengths = [length for length in lengths if length < longest] + [longest]
    dense = replace(config, sparse=None)
    return [
        KvCost(length, kv_bytes_per_token(dense, length), kv_bytes_per_token(config, length))
        for length in lengths
    ]
