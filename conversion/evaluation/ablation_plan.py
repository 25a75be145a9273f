"""What is taken away from a converted model or made larger and smaller, one thing at a time.

Each part of the method is replaced by what one would do without it; and along each setting a few
points show what it buys. Everything is made in memory, nothing of the folder changes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from conversion.evaluation.ablation_model import AblationModel
from conversion.evaluation.teacher_forced import Variant
from conversion.index_weights import IndexWeights, index_groups
from engine.model.config import ModelConfig, SparseAttentionConfig
from engine.model.decoder import Indexer

SHIPPED = "sparse"
TOP_P_POINTS = (0.7, 0.8, 0.95, 0.99)
INDEX_DIMS = (4, 8, 32)
HEAD_POINTS = 8  # numbers of heads at most
NO_STEPS = "closed-form indexer: horizon and temperature chosen, no gradient step"

Heads = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Ablation:
    """One variant, made when it is measured."""

    name: str
    description: str
    config: ModelConfig
    build: Callable[[], Variant]
    fixed_blocks: bool = False  # each head keeps the mean number of blocks of SHIPPED


class AblationPlan:
    """The ablations of one model, and those that it cannot have."""

    def __init__(self, model: AblationModel, seed: int) -> None:
        """
        Args:
            seed: of the random heads.
        """
        self._model = model
        self._seed = seed
        self.skipped: dict[str, str] = {}  # name: why
        self.ablations: tuple[Ablation, ...] = (
            self._own(SHIPPED, f"as converted: {self._summary()}", model.sparse),
            self._random_heads(),
            self._closed_form(model.sparse, "closed form", NO_STEPS),
            *self._without_age_bias(),
            self._top_k(),
            *self._without_stage_2(),
            *self._windows(),
            *self._top_p(),
            *self._fewer_heads(),
            *self._index_dims(),
        )

    def _summary(self) -> str:
        sparse = self._model.sparse
        return (
            f"{sum(map(len, sparse.retrieval_heads))} retrieval heads, "
            f"window {sparse.window_tokens}, index_dim {sparse.index_dim}"
        )

    def _own(self, name: str, description: str, sparse: SparseAttentionConfig) -> Ablation:
        """The model's own weights and indexer, with another section."""
        model = self._model
        config = replace(model.config, sparse=sparse)
        build = partial(Variant, model.decoder, config, model.decoder.indexers)
        return Ablation(name, description, config, build)

    def _closed_form(self, sparse: SparseAttentionConfig, name: str, description: str) -> Ablation:
        model, config = self._model, replace(self._model.config, sparse=sparse)

        def build() -> Variant:
            return Variant(model.decoder, config, model.closed_form(sparse))

        return Ablation(name, description, config, build)

    def _random_heads(self) -> Ablation:
        config, sparse = self._model.config, self._model.sparse
        places = [(n, head) for n in range(config.num_layers) for head in range(config.num_heads)]
        count = sum(map(len, sparse.retrieval_heads))
        drawn = random.Random(self._seed).sample(places, count)
        heads = tuple(
            tuple(sorted(head for layer, head in drawn if layer == n))
            for n in range(config.num_layers)
        )
        top_p = fmean(p for layer in sparse.top_p for p in layer)
        listed = ", ".join(f"{layer}.{head}" for layer, head in sorted(drawn))
        return self._closed_form(
            _with_heads(sparse, heads, lambda layer, head: top_p),
            "random heads",
            f"{count} heads drawn by seed {self._seed} (layer.head: {listed}), {NO_STEPS}",
        )

    def _without_age_bias(self) -> Iterator[Ablation]:
        model, name = self._model, "without age bias"
        if not model.sparse.index_age_bias:
            self.skipped[name] = f"the index has none: it is `{SHIPPED}`"
            return
        config = replace(model.config, sparse=replace(model.sparse, index_age_bias=False))
        indexers = [own and replace(own, age_bias_HA=None) for own in model.decoder.indexers]
        build = partial(Variant, model.decoder, config, indexers)
        text = "as converted, with the projections that were trained together with the bias"
        yield Ablation(name, text, config, build)

    def _top_k(self) -> Ablation:
        shipped = self._own(
            "top-k",
            "as converted, but each head keeps a fixed number of blocks, at each length and task "
            "the mean of what top-p took on the same samples, rounded up",
            self._model.sparse,
        )
        return replace(shipped, fixed_blocks=True)

    def _without_stage_2(self) -> Iterator[Ablation]:
        model, name = self._model, "without stage 2"
        teacher = model.teacher
        if not model.distilled:
            self.skipped[name] = f"{model.folder} was not distilled: it is `{SHIPPED}`"
        elif teacher is None:
            self.skipped[name] = "needs the dense source of the model: give it with --teacher"
        else:
            yield Ablation(
                name,
                "the source's weights with the same heads and indexer",
                model.config,
                partial(Variant, teacher, model.config, model.decoder.indexers),
            )

    def _windows(self) -> Iterator[Ablation]:
        sparse = self._model.sparse
        for window in (max(1, sparse.window_tokens // 2), 2 * sparse.window_tokens):
            yield self._own(
                f"window {window}",
                f"local heads see {window} tokens instead of {sparse.window_tokens}",
                replace(sparse, window_tokens=window),
            )

    def _top_p(self) -> Iterator[Ablation]:
        sparse = self._model.sparse
        for top_p in TOP_P_POINTS:
            same = tuple((top_p,) * len(layer) for layer in sparse.top_p)
            section = replace(sparse, top_p=same)
            if section.top_p == sparse.top_p:
                self.skipped[f"top_p {top_p}"] = f"it is `{SHIPPED}`"
                continue
            yield self._own(f"top_p {top_p}", f"top_p {top_p} for all heads", section)

    def _fewer_heads(self) -> Iterator[Ablation]:
        model, sparse = self._model, self._model.sparse
        scores = model.scores()
        kept = [(n, head) for n, heads in enumerate(sparse.retrieval_heads) for head in heads]
        if scores is None:
            self.skipped["heads"] = "no needle scores: give the conversion's state with --work"
            return
        if len(kept) == 1:
            self.skipped["heads"] = "there is only one"
            return
        kept.sort(key=lambda place: -scores[place[0]][place[1]])
        counts = _spread(len(kept) - 1, HEAD_POINTS)
        if len(counts) < len(kept) - 1:
            self.skipped["heads, other numbers"] = f"{len(counts)} of {len(kept) - 1} are shown"
        for count in counts:
            yield self._with_best(kept[:count], kept[count:])

    def _with_best(
        self, kept: Sequence[tuple[int, int]], dropped: Sequence[tuple[int, int]]
    ) -> Ablation:
        model, sparse = self._model, self._model.sparse
        top_p = {
            (layer, head): p
            for layer, (heads, own) in enumerate(
                zip(sparse.retrieval_heads, sparse.top_p, strict=True)
            )
            for head, p in zip(heads, own, strict=True)
        }
        heads = tuple(
            tuple(sorted(head for n, head in kept if n == layer))
            for layer in range(model.config.num_layers)
        )
        section = _with_heads(sparse, heads, lambda layer, head: top_p[layer, head])
        config = replace(model.config, sparse=section)
        indexers = model.placed(indexers_of(model.config, model.decoder.indexers, heads))
        listed = ", ".join(f"{layer}.{head}" for layer, head in dropped)
        return Ablation(
            f"heads {len(kept)}",
            f"the {len(kept)} heads of the best scores; dropped (layer.head): {listed}",
            config,
            partial(Variant, model.decoder, config, indexers),
        )

    def _index_dims(self) -> Iterator[Ablation]:
        model, sparse = self._model, self._model.sparse
        for dim in INDEX_DIMS:
            name = f"index_dim {dim}"
            if dim > model.config.head_dim:
                self.skipped[name] = f"more than the model's head_dim {model.config.head_dim}"
            elif dim == sparse.index_dim:
                self.skipped[name] = "it is `closed form`"
            else:
                yield self._closed_form(
                    replace(sparse, index_dim=dim), name, f"{dim} dimensions, {NO_STEPS}"
                )


def indexers_of(
    config: ModelConfig, indexers: Sequence[Indexer | None], heads: Heads
) -> list[Indexer | None]:
    """The rows of an indexer that belong to some of its heads, on the CPU.

    Args:
        config: of the whole indexer.
        heads: query heads to keep, by layer.
    """
    whole = IndexWeights.of_indexers(index_groups(config), indexers)
    groups = []
    for own in whole.groups:
        rows = [row for row, (layer, head) in enumerate(own.group.places) if head in heads[layer]]
        if rows:
            groups.append(own.part(rows))
    return IndexWeights(tuple(groups)).indexers(config.num_layers)


def _with_heads(
    sparse: SparseAttentionConfig, heads: Heads, top_p: Callable[[int, int], float]
) -> SparseAttentionConfig:
    """Other retrieval heads, each with its own top_p."""
    return replace(
        sparse,
        retrieval_heads=heads,
        top_p=tuple(tuple(top_p(layer, head) for head in own) for layer, own in enumerate(heads)),
    )


def _spread(most: int, points: int) -> list[int]:
    """Numbers from `most` down to 1, all of them or `points` at equal steps."""
    if most <= points:
        return list(range(most, 0, -1))
    return [round(1 + (most - 1) * step / (points - 1)) for step in range(points - 1, -1, -1)]
