"""Fit the indexer of every retrieval head on text that the model reads as it will when served.

1. the closed form: moments of some documents, the best horizon and temperature on others;
2. gradient steps from there (`conversion.indexer_training`), unless none are wanted;
3. temperatures, and top_p if it is adaptive, once more for what was learnt;
4. on further documents, how well the result selects, beside the closed form.

This module has the parts that are short and done in one go: 1, 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from conversion.attention_samples import PlantedDocument, row_kinds
from conversion.closed_form_fit import closed_form_candidates
from conversion.document_attention import LayerView, attention_rows, watch_document
from conversion.index_quality import IndexQuality, measure
from conversion.index_weights import GroupWeights, IndexWeights
from conversion.parallel import Ranks
from conversion.selection_trial import COARSE, FINE, Choice, Place, try_selection
from engine.model.config import ModelConfig, SparseAttentionConfig
from engine.model.decoder import Decoder

QUALITY_ROWS = 128  # query positions per kind and document
CURVE_TOP_P = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)

Documents = Sequence[PlantedDocument]
Advance = Callable[[], None]


@dataclass(frozen=True, slots=True)
class HeadSetting:
    """What was chosen for one head."""

    horizon_tokens: float  # of the closed form
    temperature: float  # factor on all scores, found last
    top_p: float


@dataclass(frozen=True, slots=True)
class FittedIndex:
    """Weights with their temperatures in them, and what was chosen for every head."""

    weights: IndexWeights
    settings: Mapping[Place, HeadSetting]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What a value of top_p gives."""

    top_p: float
    anywhere: IndexQuality
    answers: IndexQuality


@dataclass(frozen=True, slots=True)
class HeadQuality:
    """One head of the report, on text unseen by the fit."""

    layer: int
    head: int
    setting: HeadSetting
    anywhere: IndexQuality  # queries at any position of the text
    answers: IndexQuality  # queries at needles and answers, where only far attention helps
    closed_form: CurvePoint  # the same before training, at its own top_p
    curve: tuple[CurvePoint, ...]
    age_bias: tuple[float, ...] | None  # nats by range of ages, see `kernels.block_age`


class IndexerFit:
    """Closed form, temperatures and quality of one model with chosen heads."""

    def __init__(
        self,
        decoder: Decoder,
        config: ModelConfig,
        seed: int = 0,
        ranks: Ranks | None = None,
        advance: Advance = lambda: None,
        keep_far: bool = True,
    ) -> None:
        """
        Args:
            config: the model's with the sparse section that is being made.
            keep_far: see `FitOptions`.
            ranks: every process takes its part of all documents; results are the same on all.
            advance: called after every document of this process.
        """
        assert config.sparse is not None
        self.config = config
        self.sparse = config.sparse
        self._decoder = decoder
        self._seed = seed
        self._ranks = ranks or Ranks()
        self._advance = advance
        self._keep_far = keep_far

    def closed_form(self, documents: Documents, trial: Documents) -> FittedIndex:
        """Pass 1: moments and biases of `documents`; horizons and temperatures by `trial`."""
        device = next(self._decoder.parameters()).device
        candidates = closed_form_candidates(
            self._decoder, self.config, documents, self._seed, self._ranks, self._advance
        )
        tried = [candidate.weights.copied(device) for candidate in candidates]
        choices = self._try(tried, COARSE, trial, adaptive=False)
        best = IndexWeights(
            tuple(
                tried[choices[group.group.places[0]].candidate].groups[number]
                for number, group in enumerate(tried[0].groups)
            )
        )
        settings = {
            place: HeadSetting(
                candidates[choice.candidate].horizon_tokens, choice.temperature, choice.top_p
            )
            for place, choice in choices.items()
        }
        return _fitted(best, settings)

    def sharpened(
        self,
        weights: IndexWeights,
        before: Mapping[Place, HeadSetting],
        trial: Documents,
        *,
        adaptive: bool,
    ) -> FittedIndex:
        """Pass 3: other temperatures (and top_p if `adaptive`) for projections already in use."""
        choices = self._try([weights], FINE, trial, adaptive=adaptive)
        settings = {
            place: replace(before[place], temperature=choice.temperature, top_p=choice.top_p)
            for place, choice in choices.items()
        }
        return _fitted(weights, settings)

    def with_top_p(self, fitted: FittedIndex) -> SparseAttentionConfig:
        """The sparse section with the top_p that was chosen for every head."""
        top_p = tuple(
            tuple(fitted.settings[layer, head].top_p for head in heads)
            for layer, heads in enumerate(self.sparse.retrieval_heads)
        )
        return replace(self.sparse, top_p=top_p)

    def quality(
        self, fitted: FittedIndex, closed: FittedIndex, documents: Documents
    ) -> list[HeadQuality]:
        """Pass 4; lines in head order."""
        places = sorted(fitted.settings)
        device = next(self._decoder.parameters()).device
        # [head, fitted or closed, anywhere or answers, own top_p or the curve's, quality]
        sums = torch.zeros(len(places), 2, 2, 1 + len(CURVE_TOP_P), 5, dtype=torch.float64)
        for number in range(self._ranks.rank, len(documents), self._ranks.world):
            document = documents[number]
            rows = row_kinds(document, QUALITY_ROWS, self._seed * 1_000_003 + number)
            kinds = [rows_R.to(device) for rows_R in rows]
            watch = partial(self._measure, kinds, (fitted, closed), places, sums)
            watch_document(self._decoder, self.config, document.ids, watch)
            self._advance()
        means = self._ranks.summed(sums) / len(documents)
        biases = fitted.weights.age_bias_by_place()
        lines = zip(places, means, strict=True)
        return [
            _line(place, fitted, closed, mean.tolist(), biases.get(place)) for place, mean in lines
        ]

    def _try(
        self,
        candidates: Sequence[IndexWeights],
        temperatures: Sequence[float],
        trial: Documents,
        *,
        adaptive: bool,
    ) -> dict[Place, Choice]:
        return try_selection(
            self._decoder,
            self.config,
            candidates,
            temperatures,
            trial,
            adaptive=adaptive,
            keep_far=self._keep_far,
            seed=self._seed,
            ranks=self._ranks,
            advance=self._advance,
        )

    def _measure(
        self,
        kinds: Sequence[Tensor],
        variants: tuple[FittedIndex, FittedIndex],
        places: list[Place],
        sums: Tensor,
        view: LayerView,
    ) -> None:
        """Add every head of one layer to `sums`."""
        for (variant, fitted), (kind, rows_R) in product(enumerate(variants), enumerate(kinds)):
            for _, group in fitted.weights.of_layer(view.layer):
                for number, place in enumerate(group.group.places):
                    found = self._head_quality(group, number, view, rows_R, fitted)
                    values = torch.tensor([quality.values() for quality in found])
                    sums[places.index(place), variant, kind] += values.double()

    def _head_quality(
        self, group: GroupWeights, number: int, view: LayerView, rows_R: Tensor, fitted: FittedIndex
    ) -> list[IndexQuality]:
        head = group.group.heads[number]
        top_p = (fitted.settings[view.layer, head].top_p, *CURVE_TOP_P)
        log_RT = attention_rows(view, head, rows_R, self.config.group_size)
        scores_RT = group.scores(number, view, rows_R, self.sparse.block_tokens)
        return measure(log_RT, scores_RT, rows_R, top_p, self.sparse.block_tokens)


def _fitted(weights: IndexWeights, settings: Mapping[Place, HeadSetting]) -> FittedIndex:
    """With the temperatures in the weights."""
    factors = {place: setting.temperature for place, setting in settings.items()}
    return FittedIndex(weights.scaled(factors), settings)


def _line(
    place: Place,
    fitted: FittedIndex,
    closed: FittedIndex,
    means: list[list[list[list[float]]]],
    bias: tuple[float, ...] | None,
) -> HeadQuality:
    """One head from its means [fitted or closed][anywhere or answers][top_p][quality]."""

    def point(variant: int, number: int, top_p: float) -> CurvePoint:
        anywhere, answers = (IndexQuality.from_values(kind[number]) for kind in means[variant])
        return CurvePoint(top_p, anywhere, answers)

    setting = fitted.settings[place]
    own = point(0, 0, setting.top_p)
    return HeadQuality(
        *place,
        setting,
        own.anywhere,
        own.answers,
        point(1, 0, closed.settings[place].top_p),
        tuple(point(0, 1 + number, p) for number, p in enumerate(CURVE_TOP_P)),
        bias,
    )
