"""The step `fit`: from a model with chosen heads to its indexer, resumable at every part.

In the folder of the step:

    closed_form.safetensors   weights before training, in the layout of indexer.safetensors
    training.safetensors      weights, moments and losses after the last saved step

Both are replaced as a whole, so a step that was stopped goes on from what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from conversion.age_bias_fit import with_old_ages
from conversion.attention_samples import PlantedDocument
from conversion.document_feed import DocumentFeed
from conversion.fit_options import FitOptions
from conversion.index_quality import IndexQuality
from conversion.index_weights import IndexWeights, index_groups
from conversion.indexer_fit import FittedIndex, HeadQuality, HeadSetting, IndexerFit
from conversion.indexer_training import IndexerTraining
from conversion.parallel import Ranks
from conversion.progress_bar import progress_bar
from conversion.state import indexer_tensors, read_snapshot, tensor_indexers, write_snapshot
from engine.model.config import ModelConfig, SparseAttentionConfig
from engine.model.decoder import Decoder, Indexer
from kernels.block_age import age_ranges


@dataclass(frozen=True, slots=True)
class FitResult:
    """What the step has made."""

    indexers: list[Indexer | None]  # per layer
    sparse: SparseAttentionConfig  # with the top_p of every head
    quality: list[HeadQuality]
    losses: list[float]  # per training step, nats per query, mean over heads


class FitStep:
    """The fit of one model's indexer."""

    def __init__(
        self,
        decoder: Decoder,
        config: ModelConfig,
        feed: DocumentFeed,
        options: FitOptions,
        folder: Path,
        seed: int,
        ranks: Ranks,
        console: Console,
        far_feed: DocumentFeed | None = None,
    ) -> None:
        """
        Args:
            config: the model's with the sparse section that is being made.
            feed: holds out `options.held_out` documents.
            far_feed: holds out longer ones, for biases of ages that the others do not reach.
            folder: of the step's state; made here.
        """
        self._decoder = decoder
        self._config = config
        self._feed = feed
        self._far_feed = far_feed
        self._options = options
        self._folder = folder
        self._seed = seed
        self._ranks = ranks
        self._console = console

    def run(self) -> FitResult:
        """Closed form, training, temperatures, quality; raises ConversionError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        options = self._options
        held_out = self._feed.held_out()
        # Read now: too little text should turn out before the training.
        far = [] if self._far_feed is None else self._far_feed.held_out()
        cuts = (options.moment_documents, options.moment_documents + options.trial_documents)
        moments, trial, unseen = (
            held_out[: cuts[0]],
            held_out[cuts[0] : cuts[1]],
            held_out[cuts[1] :],
        )
        closed = self._closed_form(moments, trial)
        training = self._train(closed)
        total = self._mine(trial) + self._mine(far) + self._mine(unseen)
        with progress_bar(self._console, "measure", total) as advance:
            fit = self._fit(advance)
            weights = training.weights.copied(self._ranks.device)
            last = _last_range(held_out, self._config)
            weights = weights.settled(last)
            adaptive = options.adaptive_top_p
            fitted = fit.sharpened(weights, closed.settings, trial, adaptive=adaptive)
            if far:
                place = (self._decoder, self._config, fitted.weights)
                aged = with_old_ages(*place, far, last, self._seed, self._ranks, advance)
                fitted = FittedIndex(aged, fitted.settings)
            quality = fit.quality(fitted, closed, unseen)
        return FitResult(
            fitted.weights.indexers(self._config.num_layers),
            fit.with_top_p(fitted),
            quality,
            training.losses,
        )

    def _closed_form(
        self, moments: Sequence[PlantedDocument], trial: Sequence[PlantedDocument]
    ) -> FittedIndex:
        assert self._config.sparse is not None
        path = self._folder / "closed_form.safetensors"
        if self._ranks.agreed(path.exists()):
            return self._read(path)
        readings = 2 if self._config.sparse.index_age_bias else 1
        total = readings * self._mine(moments) + self._mine(trial)
        with progress_bar(self._console, "closed form", total) as advance:
            fit = self._fit(advance)
            closed = fit.closed_form(moments, trial)
        if self._ranks.is_first:
            settings = [[*place, asdict(setting)] for place, setting in closed.settings.items()]
            tensors = indexer_tensors(closed.weights.indexers(self._config.num_layers))
            write_snapshot(path, tensors, settings)
        self._ranks.wait()
        return self._read(path)

    def _read(self, path: Path) -> FittedIndex:
        tensors, settings = read_snapshot(path)
        indexers = tensor_indexers(tensors, self._config.num_layers)
        weights = IndexWeights.of_indexers(index_groups(self._config), indexers)
        return FittedIndex(
            weights.copied(self._ranks.device),
            {(layer, head): HeadSetting(**setting) for layer, head, setting in settings},
        )

    def _fit(self, advance: Callable[[], None]) -> IndexerFit:
        place = (self._decoder, self._config, self._seed, self._ranks, advance)
        return IndexerFit(*place, keep_far=self._options.keep_far)

    def _train(self, closed: FittedIndex) -> IndexerTraining:
        """Go on with the training that is there, or begin."""
        path = self._folder / "training.safetensors"
        training = IndexerTraining(
            self._decoder, self._config, closed.weights, self._options, self._seed, self._ranks
        )
        training.load(path)
        steps = self._options.steps
        if training.step >= steps:
            return training
        documents = self._feed.training(training.first_document, self._ranks.world)
        with progress_bar(self._console, "train", steps, training.step) as advance:
            training.run(documents, path, lambda _, loss: advance(f"KL {loss:.3f}"))
        return training

    def _mine(self, documents: Sequence[PlantedDocument]) -> int:
        """How many of the documents this process reads."""
        return len(range(self._ranks.rank, len(documents), self._ranks.world))


def _last_range(documents: Sequence[PlantedDocument], config: ModelConfig) -> int:
    """Of the ages in the documents."""
    assert config.sparse is not None
    longest = max(len(document.ids) for document in documents)
    return int(age_ranges(torch.tensor((longest - 1) // config.sparse.block_tokens)))


def quality_line(head: HeadQuality) -> dict[str, Any]:
    """One head of quality.json, numbers short enough to read."""
    rounded: dict[str, Any] = _rounded(asdict(head))
    return rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def quality_table(quality: Sequence[HeadQuality]) -> Table:
    """Every head: what it keeps, what that takes and what the teacher needs."""
    table = Table(
        title="indexer on unseen text: mass kept / blocks / blocks the teacher needs / KL"
    )
    for column in ("layer, head", "answers", "anywhere", "closed form: answers", "anywhere"):
        table.add_column(column)
    for head in quality:
        before = head.closed_form
        cells = map(_cell, (head.answers, head.anywhere, before.answers, before.anywhere))
        table.add_row(f"{head.layer}, {head.head}", *cells)
    return table


def _cell(q: IndexQuality) -> str:
    return f"{q.kept_mass:.3f} / {q.blocks:.1f} / {q.teacher_blocks:.1f} / {q.kl:.2f}"
