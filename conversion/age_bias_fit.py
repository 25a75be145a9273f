"""Biases for ages of a whole model without gradient steps: shares of attention by age, from text.

Several sets of projections are given biases in one reading, with the same sampled queries
(`conversion.age_bias` has the maths).

Shapes: C candidates, H retrieval heads of all layers, R sampled rows, A = AGE_RANGES.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conversion.age_bias import balanced, range_log_mass
from conversion.attention_samples import PlantedDocument, sample_rows
from conversion.document_attention import LayerView, attention_rows, watch_document
from conversion.index_loss import block_log_mass
from conversion.index_weights import IndexWeights
from conversion.parallel import Ranks
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from kernels.block_age import AGE_RANGES

SAMPLED_ROWS = 128  # query positions per document


def with_balanced_ages(
    decoder: Decoder,
    config: ModelConfig,
    candidates: Sequence[IndexWeights],
    documents: Sequence[PlantedDocument],
    seed: int,
    ranks: Ranks,
    advance: Callable[[], None],
) -> list[IndexWeights]:
    """Every candidate with the biases that its projections need.

    Args:
        config: with the sparse section that is being made.
        candidates: projections of the same groups, without biases.
        documents: every process takes its part of them.
        advance: called after each document of this process.
    """
    index_CHRA, attention_HRA = _masses(
        decoder, config, candidates, documents, seed, ranks, advance
    )
    device = next(decoder.parameters()).device
    biases_CHA = balanced(index_CHRA, attention_HRA, ranks).to(device)
    pairs = zip(candidates, biases_CHA, strict=True)
    return [weights.with_age_biases(biases_HA) for weights, biases_HA in pairs]


def with_old_ages(
    decoder: Decoder,
    config: ModelConfig,
    weights: IndexWeights,
    documents: Sequence[PlantedDocument],
    first: int,
    seed: int,
    ranks: Ranks,
    advance: Callable[[], None],
) -> IndexWeights:
    """Weights with biases of ranges that longer documents reach; the others keep theirs.

    A training that has not seen an age leaves it the bias of the oldest that it saw, and heads that
    look near then select far too many old blocks.

    Args:
        weights: with biases.
        documents: longer than those of the training.
        first: the first range whose bias is set anew.
    """
    index_CHRA, attention_HRA = _masses(decoder, config, [weights], documents, seed, ranks, advance)
    before_HA = torch.cat(weights.age_biases()).cpu()
    bias_HA = balanced(index_CHRA[0], attention_HRA, ranks, before_HA, first)
    return weights.with_age_biases(bias_HA.to(next(decoder.parameters()).device))


def _masses(
    decoder: Decoder,
    config: ModelConfig,
    candidates: Sequence[IndexWeights],
    documents: Sequence[PlantedDocument],
    seed: int,
    ranks: Ranks,
    advance: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Log masses by range of sampled rows: of the index [C, H, R, A], of attention [H, R, A]."""
    device = next(decoder.parameters()).device
    read = [_RangeMasses.empty(config, candidates, 0)]
    for number in range(ranks.rank, len(documents), ranks.world):
        rows_R = sample_rows(documents[number], SAMPLED_ROWS, seed * 1_000_003 + number).to(device)
        masses = _RangeMasses.empty(config, candidates, len(rows_R))

        def watch(view: LayerView, rows_R: Tensor = rows_R, masses: _RangeMasses = masses) -> None:
            masses.fill(view, rows_R)

        watch_document(decoder, config, documents[number].ids, watch)
        read.append(masses)
        advance()
    index_CHRA = torch.cat([own.index_CHRA for own in read], dim=2)
    return index_CHRA, torch.cat([own.attention_HRA for own in read], dim=1)


@dataclass(frozen=True, slots=True)
class _RangeMasses:
    """Log masses by range of ages of one document's rows, on the host."""

    config: ModelConfig
    candidates: Sequence[IndexWeights]
    index_CHRA: Tensor
    attention_HRA: Tensor

    @classmethod
    def empty(
        cls, config: ModelConfig, candidates: Sequence[IndexWeights], rows: int
    ) -> _RangeMasses:
        heads = sum(len(group.group.heads) for group in candidates[0].groups)
        index_CHRA = torch.empty(len(candidates), heads, rows, AGE_RANGES)
        return cls(config, candidates, index_CHRA, torch.empty(heads, rows, AGE_RANGES))

    def fill(self, view: LayerView, rows_R: Tensor) -> None:
        """The rows of all heads of one layer."""
        assert self.config.sparse is not None
        block = self.config.sparse.block_tokens

        def by_range(log_RT: Tensor) -> Tensor:
            return range_log_mass(block_log_mass(log_RT, block), rows_R, block)

        row = 0
        for number, own in enumerate(self.candidates[0].groups):
            for place, head in enumerate(own.group.heads):
                if own.group.layer == view.layer:
                    log_RT = attention_rows(view, head, rows_R, self.config.group_size)
                    self.attention_HRA[row] = by_range(log_RT)
                    for candidate, weights in enumerate(self.candidates):
                        scores_RT = weights.groups[number].scores(place, view, rows_R, block)
                        self.index_CHRA[candidate, row] = by_range(scores_RT)
                row += 1
