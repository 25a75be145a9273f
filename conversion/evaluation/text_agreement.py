"""What a variant makes of plain text: loss by position, and how far it is from the dense model.

Every document is a prompt followed by tokens that are decoded teacher-forced. The measured variants
and the dense reference go through it together, so no logits are kept.

Shapes: R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from conversion.chunk_sizes import chunk_sizes
from conversion.evaluation.intervals import Interval, mean_score
from conversion.evaluation.teacher_forced import Variant
from conversion.sequence import CachedSequence

LOGIT_ELEMENTS = 2**26  # of one slice: 256 MiB in float32
POSITION_BINS = 16


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the next-token distributions of a variant follow the reference's over decoded tokens."""

    variant: str
    length: int
    prompt: str  # "served": prefilled by the variant's own rule; "dense": as the dense model
    tokens: int
    kl_mean: float  # nats, reference || variant
    kl_median: float
    kl_p99: float
    top1: Interval  # share of tokens with the same best guess


@dataclass(frozen=True, slots=True)
class LossCurve:
    """Mean loss in nats per token by position; positions past `decoded_from` are decoded."""

    variant: str
    length: int
    decoded_from: int
    edges: tuple[int, ...]  # bin i holds positions [edges[i], edges[i + 1])
    losses: tuple[float, ...]
    mean: float
    decoded_mean: float


@dataclass(frozen=True, slots=True)
class TextPass:
    """One way through a document: a variant, and whether its prompt is computed densely."""

    name: str
    variant: Variant
    dense_prompt: bool = False


class TextMeasure:
    """Runs passes side by side; the first one is the reference of the others."""

    def __init__(self, passes: Sequence[TextPass], length: int, decoded: int) -> None:
        """
        Args:
            length: tokens of every document.
            decoded: how many of them are decoded; the others are the prompt.
        """
        assert 0 < decoded < length
        self._passes = passes
        self._length = length
        self._prompt = length - decoded
        self._losses: list[list[Tensor]] = [[] for _ in passes]  # per pass and document [T - 1]
        self._kl: list[list[Tensor]] = [[] for _ in passes]  # per pass and document [decoded]
        self._same: list[list[Tensor]] = [[] for _ in passes]

    @torch.no_grad()
    def run(self, documents: Sequence[Sequence[int]], advance: Callable[[], None]) -> None:
        """Measure documents of `length` token ids.

        Args:
            advance: called after each document.
        """
        sequences = [way.variant.sequence(self._length) for way in self._passes]
        for ids in documents:
            for sequence in sequences:
                sequence.cut(0)
            self._document(ids, sequences)
            advance()

    def agreements(self) -> list[Agreement]:
        """One per pass after the first."""
        found = []
        for number, way in list(enumerate(self._passes))[1:]:
            kl = torch.cat(self._kl[number])
            found.append(
                Agreement(
                    variant=way.name,
                    length=self._length,
                    prompt="dense" if way.dense_prompt else "served",
                    tokens=len(kl),
                    kl_mean=float(kl.mean()),
                    kl_median=float(kl.quantile(0.5)),
                    kl_p99=float(kl.quantile(0.99)),
                    top1=mean_score([same.tolist() for same in self._same[number]]),
                )
            )
        return found

    def curves(self) -> list[LossCurve]:
        """One per pass whose prompt is computed as it is served."""
        return [
            self._curve(way.name, torch.stack(losses).double().mean(0))
            for way, losses in zip(self._passes, self._losses, strict=True)
            if not way.dense_prompt
        ]

    def _curve(self, name: str, losses_T: Tensor) -> LossCurve:
        bins = min(POSITION_BINS, len(losses_T))
        edges = [round(i * len(losses_T) / bins) for i in range(bins + 1)]
        parts = [losses_T[a:b] for a, b in pairwise(edges)]
        return LossCurve(
            variant=name,
            length=self._length,
            decoded_from=self._prompt,
            edges=tuple(edges),
            losses=tuple(float(part.mean()) for part in parts),
            mean=float(losses_T.mean()),
            decoded_mean=float(losses_T[self._prompt :].mean()),
        )

    def _document(self, ids: Sequence[int], sequences: Sequence[CachedSequence]) -> None:
        losses: list[list[Tensor]] = [[] for _ in sequences]
        distances: list[list[Tensor]] = [[] for _ in sequences]
        same: list[list[Tensor]] = [[] for _ in sequences]
        for start, stop in self._chunks():
            hidden = [
                self._forward(way, sequence, ids[start:stop], start)
                for way, sequence in zip(self._passes, sequences, strict=True)
            ]
            for first, last in self._slices(start, stop):
                targets_R = torch.tensor(ids[first + 1 : last + 1], device=hidden[0].device)
                reference_RV = torch.empty(0)
                for number, (way, rows) in enumerate(zip(self._passes, hidden, strict=True)):
                    logits_RV = way.variant.decoder.logits(rows[first - start : last - start])
                    log_p_RV = logits_RV.log_softmax(-1)
                    losses[number].append(-log_p_RV.gather(1, targets_R[:, None])[:, 0].cpu())
                    if number == 0:
                        reference_RV = log_p_RV
                    elif start >= self._prompt:
                        distances[number].append(_kl(reference_RV, log_p_RV).cpu())
                        best = reference_RV.argmax(-1) == log_p_RV.argmax(-1)
                        same[number].append(best.float().cpu())
        for number in range(len(sequences)):
            self._losses[number].append(torch.cat(losses[number]))
            if number:
                self._kl[number].append(torch.cat(distances[number]))
                self._same[number].append(torch.cat(same[number]))

    def _forward(
        self, way: TextPass, sequence: CachedSequence, ids: Sequence[int], start: int
    ) -> Tensor:
        if start >= self._prompt:
            return way.variant.generate(sequence, ids)
        return sequence.prefill(ids, dense=way.dense_prompt)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Spans of one step; the last token is a target only."""
        sizes = chunk_sizes(self._passes[0].variant.device)
        for start in range(0, self._prompt, sizes.prompt_tokens):
            yield start, min(start + sizes.prompt_tokens, self._prompt)
        for start in range(self._prompt, self._length - 1, sizes.decode_rows):
            yield start, min(start + sizes.decode_rows, self._length - 1)

    def _slices(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Parts of a span whose logits fit into memory."""
        vocabulary = self._passes[0].variant.config.vocab_size
        rows = max(1, LOGIT_ELEMENTS // vocabulary)
        for first in range(start, stop, rows):
            yield first, min(first + rows, stop)


def _kl(reference_RV: Tensor, other_RV: Tensor) -> Tensor:
    """KL(reference || other) in nats per row, from log probabilities."""
    kl_R = (reference_RV.exp() * (reference_RV - other_RV)).sum(-1)
    return kl_R.clamp(min=0.0)  # rounding may leave a hair below
