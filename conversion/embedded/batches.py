"""Training batches, each sequence a pure function of its step and row: a resumed training, and one
on another number of GPUs, sees the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conversion.embedded.episodes import EpisodeWriter
from conversion.embedded.options import PretrainingOptions
from conversion.errors import ConversionError
from conversion.parallel import Ranks


class TrainingBatches(Dataset[tuple[Tensor, Tensor]]):
    """Item `step` of a phase: ids int64 [B, length + 1], weights of targets float32 [B, length].

    B is this process's share of the batch.
    """

    def __init__(
        self,
        train: NDArray[np.uint16],
        tokenizer: Tokenizer,
        options: PretrainingOptions,
        phase: int,
        ranks: Ranks,
    ) -> None:
        self._train = train
        self._seed = (options.seed, phase)
        self._phase = options.phases[phase]
        rows = self._phase.batch_tokens // self._phase.length
        if rows < ranks.world:
            raise ConversionError(
                f"a batch has {rows} sequences of {self._phase.length} tokens, "
                f"too few for {ranks.world} processes"
            )
        self._rows = range(ranks.rank, rows, ranks.world)
        self.limited = sum(row < round(self._phase.limited * rows) for row in self._rows)
        """Sequences of every item, the first ones, in which heads are limited to their roles."""
        weight = self._phase.answer_weight or options.answer_weight
        self._writer = EpisodeWriter(tokenizer, weight, self._phase.lists)
        assert len(train) > self._phase.length + 1, "less text than one sequence"

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rows = [
            self._sequence(np.random.default_rng([*self._seed, step, row])) for row in self._rows
        ]
        ids = torch.from_numpy(np.stack([ids for ids, _ in rows]))
        weights = torch.from_numpy(np.stack([weights for _, weights in rows]))
        return ids, weights[:, 1:].contiguous()

    def _sequence(self, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        length = self._phase.length + 1
        start = int(rng.integers(0, len(self._train) - length))
        code = self._train[start : start + length].astype(np.int64)
        if rng.random() >= self._phase.episodes:
            return code, np.ones(length, dtype=np.float32)
        episode = self._writer.write(code, rng)
        return episode.ids, episode.weights

    def stream(self, first: int, workers: int, pin: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from step `first` on, without end, put together in other processes."""
        yield from DataLoader(
            self,
            batch_size=None,
            sampler=itertools.count(first),
            num_workers=workers,
            prefetch_factor=8 if workers else None,
            pin_memory=pin,
        )
