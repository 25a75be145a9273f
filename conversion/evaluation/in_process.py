"""A model in this process as a subject: samples in, scores out, through the serving path.

A document is computed once for all its questions; its generated tokens, and the questions of code
facts, run under the decode rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer

from conversion.evaluation.samples import PromptSample, Sample, prompt_ids, reference_score
from conversion.evaluation.teacher_forced import (
    EncodedFacts,
    Variant,
    attended_fractions,
    right_answers,
)
from conversion.evaluation.trace_run import right_steps
from conversion.evaluation.traces import Trace
from conversion.sequence import CachedSequence
from conversion.side_by_side import side_by_side

Encoded = EncodedFacts | list[int]


class InProcess:
    """One variant of a loaded model."""

    def __init__(self, name: str, variant: Variant, tokenizer: Tokenizer) -> None:
        self.name = name
        self.variant = variant
        self.attended_fraction: float | None = None
        """Of the context, per decode row and retrieval head, over the newest `scores`."""
        self._tokenizer = tokenizer

    def scores(
        self, samples: Sequence[Sample], advance: Callable[[], None] = lambda: None
    ) -> list[tuple[float, ...]]:
        """Scores per sample, one per question.

        Args:
            advance: called after each sample.
        """
        encoded = side_by_side(self._encode, samples)
        branches = [ids.branch_tokens for ids in encoded if isinstance(ids, EncodedFacts)]
        capacity = max(map(_capacity, samples, encoded))
        sequence = self.variant.sequence(capacity, max(branches, default=0))
        results = []
        for sample, ids in zip(samples, encoded, strict=True):
            results.append(self._score(sequence, sample, ids))
            advance()
        fractions = attended_fractions(sequence)
        self.attended_fraction = sum(fractions) / len(fractions) if fractions else None
        return results

    def right_steps(
        self, traces: Sequence[Trace], advance: Callable[[], None] = lambda: None
    ) -> list[list[bool]]:
        """Which steps of each trace are answered exactly; `advance` as above."""
        found = []
        for trace in traces:
            found.append(right_steps(self.variant, trace))
            advance()
        return found

    def _encode(self, sample: Sample) -> Encoded:
        if isinstance(sample, PromptSample):
            return prompt_ids(self._tokenizer, sample.prompt)
        return EncodedFacts.encode(self._tokenizer, sample)

    def _score(self, sequence: CachedSequence, sample: Sample, ids: Encoded) -> tuple[float, ...]:
        if isinstance(ids, EncodedFacts):
            return tuple(map(float, right_answers(self.variant, sequence, ids)))
        assert isinstance(sample, PromptSample)
        return (reference_score(self._continue(sequence, sample, ids), sample.references),)

    @torch.no_grad()
    def _continue(self, sequence: CachedSequence, sample: PromptSample, ids: list[int]) -> str:
        """Greedy continuation; ends once it holds every reference: nothing more can count."""
        decoder, config = self.variant.decoder, self.variant.config
        sequence.cut(0)
        hidden_TE = sequence.prefill(ids)
        made: list[int] = []
        text = ""
        while True:
            token = int(decoder.logits(hidden_TE[-1:]).argmax())
            if token in config.eos_token_ids:
                return text
            made.append(token)
            text = self._tokenizer.decode(made)
            if len(made) == sample.generated_tokens:
                return text
            if reference_score(text, sample.references) == 1.0:
                return text
            hidden_TE = self.variant.generate(sequence, [token])


def _capacity(sample: Sample, ids: Encoded) -> int:
    """Tokens that a sample may come to."""
    if isinstance(ids, EncodedFacts):
        return ids.tokens
    assert isinstance(sample, PromptSample)
    return len(ids) + sample.generated_tokens
