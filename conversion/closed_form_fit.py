"""The closed form of a whole model: moments from text, one candidate for each horizon.

A query counts by the attention it pays further back than a window's length or NEAR_TOKENS,
whichever is less, because that is what selection is for (`conversion.closed_form` has the maths).

Shapes: R sampled rows, T tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conversion.age_bias_fit import with_balanced_ages
from conversion.attention_samples import PlantedDocument, sample_rows
from conversion.closed_form import Moments, factorise, mean_rotation
from conversion.document_attention import LayerView, attention_rows, watch_document
from conversion.index_weights import GroupWeights, IndexGroup, IndexWeights, index_groups
from conversion.parallel import Ranks
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.rope import rope_frequencies

SAMPLED_ROWS = 128  # query positions per document
NEAR_TOKENS = 256
HORIZONS = (0.0, 0.25, 0.5, 1.0, 2.0)  # of the documents' length


@dataclass(frozen=True, slots=True)
class Candidate:
    """Projections that take distances to be uniform up to a horizon."""

    horizon_tokens: float
    weights: IndexWeights


@dataclass(frozen=True, slots=True)
class GroupMoments:
    """What is learnt of one group's queries and keys."""

    group: IndexGroup
    queries: list[Moments]
    keys: Moments

    @classmethod
    def empty(cls, group: IndexGroup, dim: int) -> GroupMoments:
        return cls(group, [Moments.empty(dim) for _ in group.heads], Moments.empty(dim))


def closed_form_candidates(
    decoder: Decoder,
    config: ModelConfig,
    documents: Sequence[PlantedDocument],
    seed: int,
    ranks: Ranks,
    advance: Callable[[], None],
) -> list[Candidate]:
    """One candidate for each of HORIZONS, with biases for ages if the index is to have them.

    Args:
        config: with the sparse section that is being made.
        documents: every process takes its part of them; for biases they are read once more.
        advance: called after each reading of a document by this process.
    """
    assert config.sparse is not None
    device = next(decoder.parameters()).device
    moments = [GroupMoments.empty(group, config.head_dim) for group in index_groups(config)]
    for number in range(ranks.rank, len(documents), ranks.world):
        rows_R = sample_rows(documents[number], SAMPLED_ROWS, seed * 1_000_003 + number).to(device)

        def watch(view: LayerView, rows_R: Tensor = rows_R) -> None:
            for group in moments:
                if group.group.layer == view.layer:
                    _add(group, view, rows_R, config)

        watch_document(decoder, config, documents[number].ids, watch)
        advance()
    for group in moments:
        for own in (*group.queries, group.keys):
            _sum_over(own, ranks)
    longest = max(len(document.ids) for document in documents)
    candidates = [_candidate(moments, share * longest, config) for share in HORIZONS]
    if not config.sparse.index_age_bias:
        return candidates
    plain = [candidate.weights.copied(device) for candidate in candidates]
    aged = with_balanced_ages(decoder, config, plain, documents, seed, ranks, advance)
    pairs = zip(candidates, aged, strict=True)
    return [replace(candidate, weights=weights) for candidate, weights in pairs]


def _add(group: GroupMoments, view: LayerView, rows_R: Tensor, config: ModelConfig) -> None:
    assert config.sparse is not None
    near = min(NEAR_TOKENS, config.sparse.window_tokens)
    keys_T = torch.arange(len(view.q_THD), device=rows_R.device)
    far_RT = (keys_T < (rows_R - near)[:, None]) & (keys_T >= config.sparse.block_tokens)
    group.keys.add(view.k_pre_TND[:, group.group.kv_head])
    for head, moments in zip(group.group.heads, group.queries, strict=True):
        log_RT = attention_rows(view, head, rows_R, config.group_size)
        weight_R = (log_RT.exp() * far_RT).sum(-1) + 1e-6  # never all zero
        moments.add(view.q_pre_THD[rows_R, head], weight_R)


def _sum_over(moments: Moments, ranks: Ranks) -> None:
    """The same moments of all processes' documents, on every process."""
    (moments.count,) = ranks.total([moments.count])
    moments.sum_D = ranks.summed(moments.sum_D)
    moments.outer_DD = ranks.summed(moments.outer_DD)


def _candidate(moments: Sequence[GroupMoments], horizon: float, config: ModelConfig) -> Candidate:
    assert config.sparse is not None
    assert config.sparse.index_dim is not None
    frequencies, _ = rope_frequencies(config.rope, config.head_dim)
    target_DD = mean_rotation(frequencies, horizon) * config.head_dim**-0.5
    groups = []
    for own in moments:
        seconds = torch.stack([query.second for query in own.queries])
        fitted = factorise(seconds, own.keys.covariance, target_DD, config.sparse.index_dim)
        w_q_GID, w_k_ID = (weight.float() for weight in fitted)
        groups.append(GroupWeights(own.group, w_q_GID, w_k_ID))
    return Candidate(horizon, IndexWeights(tuple(groups)))
