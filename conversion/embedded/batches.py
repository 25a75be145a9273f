"""Training batches, each a pure function of its step, so that a resumed training sees the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conversion.embedded.episodes import EpisodeWriter
from conversion.embedded.options import Phase, PretrainingOptions


class TrainingBatches(Dataset[tuple[Tensor, Tensor]]):
    """Item `step`: token ids int64 [B, length + 1], weights of the targets float32 [B, length]."""

    def __init__(
        self, train: NDArray[np.uint16], tokenizer: Tokenizer, options: PretrainingOptions
    ) -> None:
        longest = options.max_length + 1
        assert len(train) > longest, "less text than one sequence"
        self._train = train
        self._options = options
        self._writer = EpisodeWriter(tokenizer, options.answer_weight)

    def __len__(self) -> int:
        return self._options.total_steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        phase, _ = self._options.place(step)
        rng = np.random.default_rng([self._options.seed, step])
        rows = [
            self._sequence(phase, rng) for _ in range(self._options.batch_tokens // phase.length)
        ]
        ids = torch.from_numpy(np.stack([ids for ids, _ in rows]))
        weights = torch.from_numpy(np.stack([weights for _, weights in rows]))
        return ids, weights[:, 1:].contiguous()

    def _sequence(
        self, phase: Phase, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        length = phase.length + 1
        start = int(rng.integers(0, len(self._train) - length))
        code = self._train[start : start + length].astype(np.int64)
        if rng.random() >= phase.episodes:
            return code, np.ones(length, dtype=np.float32)
        episode = self._writer.write(code, rng)
        return episode.ids, episode.weights


def stream(
    batches: TrainingBatches, first_step: int, workers: int, pin: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from `first_step` on, put together in other processes."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first_step, len(batches)),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        pin_memory=pin,
    )
    yield from loader
