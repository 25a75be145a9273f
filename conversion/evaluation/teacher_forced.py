"""What a conversion costs: planted facts answered and loss on text, through the serving path.

Everything that the model would have generated runs under the decode rule, teacher-forced: a greedy
answer is right exactly if every digit is the best guess after the digits before it. The question
runs under the decode rule too, which is stricter than a prompt that ends with it.

Shapes: R decode rows, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from conversion.chunk_sizes import chunk_sizes
from conversion.code_facts import FactDocument
from conversion.evaluation.samples import continued_ids, prompt_ids
from conversion.sequence import CachedSequence
from engine.model.attention_layers import BlockSelection, PrefillMode
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder, Indexer
from engine.model.kv_bytes import IndexDtype


@dataclass(frozen=True, slots=True)
class Variant:
    """A model with head roles to measure; `config` may have other ones than the decoder's own."""

    decoder: Decoder
    config: ModelConfig
    indexers: Sequence[Indexer | None]
    selections: Sequence[BlockSelection] | None = None  # per layer; None: as in serving
    prefill_attention: PrefillMode = "dense"  # of retrieval heads
    index_dtype: IndexDtype = "auto"  # of index keys

    def sequence(self, capacity: int, branch_tokens: int = 0) -> CachedSequence:
        """An empty sequence; arguments as `CachedSequence`."""
        return CachedSequence(
            self.decoder,
            self.config,
            self.indexers,
            capacity,
            branch_tokens=branch_tokens,
            selections=self.selections,
            prefill_attention=self.prefill_attention,
            index_dtype=self.index_dtype,
        )

    def generate(self, sequence: CachedSequence, ids: Sequence[int]) -> Tensor:
        """Append generated tokens: hidden states [R, E].

        Without an indexer the two rules agree, and prefill computes many rows faster.
        """
        return sequence.decode(ids) if self.selects else sequence.prefill(ids)

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @property
    def selects(self) -> bool:
        """Whether decoding differs from prefill."""
        return any(indexer is not None for indexer in self.indexers)


@dataclass(frozen=True, slots=True)
class FactResult:
    """Answers of one variant. `attended_fraction` is None where nothing was selected."""

    asked: int
    right: int
    attended_fraction: float | None

    @property
    def accuracy(self) -> float:
        return self.right / self.asked


@torch.no_grad()
def answer_facts(
    variant: Variant,
    tokenizer: Tokenizer,
    documents: Sequence[FactDocument],
    advance: Callable[[], None] = lambda: None,
) -> FactResult:
    """Ask every question of every document. A document is computed once for all its questions.

    Args:
        advance: called after each document.
    """
    asked = right = 0
    fractions: list[float] = []
    for document in documents:
        encoded = EncodedFacts.encode(tokenizer, document)
        sequence = variant.sequence(encoded.tokens, encoded.branch_tokens)
        answers = right_answers(variant, sequence, encoded)
        asked += len(answers)
        right += sum(answers)
        fractions += attended_fractions(sequence)
        advance()
    return FactResult(asked, right, sum(fractions) / len(fractions) if fractions else None)


@dataclass(frozen=True, slots=True)
class EncodedFacts:
    """Token ids of a document, and of each question with its answer.

    A document and a question are tokenised as one text, as a server gets them: a line break at the
    document's end may become one token with what follows. `text` is what all questions share.
    """

    text: list[int]
    questions: list[tuple[list[int], list[int]]]

    @classmethod
    def encode(cls, tokenizer: Tokenizer, document: FactDocument) -> EncodedFacts:
        asked = [prompt_ids(tokenizer, document.text + q.text) for q in document.questions]
        text = prompt_ids(tokenizer, document.text)
        same = takewhile(lambda ids: len(set(ids)) == 1, zip(text, *asked, strict=False))
        shared = sum(1 for _ in same)
        questions = [
            (ids[shared:], continued_ids(tokenizer, question.answer))
            for ids, question in zip(asked, document.questions, strict=True)
        ]
        return cls(text[:shared], questions)

    @property
    def tokens(self) -> int:
        """Of the document."""
        return len(self.text)

    @property
    def branch_tokens(self) -> int:
        """Of the longest question and answer."""
        return max(len(question) + len(answer) for question, answer in self.questions)


@torch.no_grad()
def right_answers(variant: Variant, sequence: CachedSequence, document: EncodedFacts) -> list[bool]:
    """Which questions are answered exactly; whatever was in `sequence` is forgotten."""
    sequence.cut(0)
    sequence.prefill(document.text)
    continuations = [[*question, *answer[:-1]] for question, answer in document.questions]
    hidden = sequence.branch(continuations, decode=variant.selects)
    answers = [answer for _, answer in document.questions]
    ends_RE = torch.cat([h[-len(a) :] for h, a in zip(hidden, answers, strict=True)])
    guesses_R = variant.decoder.logits(ends_RE).argmax(-1)
    parts = torch.split(guesses_R, [len(answer) for answer in answers])
    return [part.tolist() == answer for part, answer in zip(parts, answers, strict=True)]


@dataclass(frozen=True, slots=True)
class LossResult:
    """Mean loss in nats per token over `tokens` tokens."""

    loss: float
    tokens: int
    attended_fraction: float | None


@torch.no_grad()
def decode_loss(
    variant: Variant,
    documents: Sequence[Sequence[int]],
    decoded: int,
    chunk_rows: int | None = None,
) -> LossResult:
    """Loss on the last `decoded` tokens of each document as if the model had generated them.

    Args:
        chunk_rows: decode rows of one step; None: as suits the device.
    """
    chunk_rows = chunk_rows or chunk_sizes(variant.device).decode_rows
    total, count = 0.0, 0
    fractions: list[float] = []
    for ids in documents:
        start = len(ids) - decoded - 1
        assert start > 0, "a document needs a prompt"
        sequence = variant.sequence(len(ids))
        sequence.prefill(ids[:start])
        for first in range(start, len(ids) - 1, chunk_rows):
            stop = min(first + chunk_rows, len(ids) - 1)
            logits_RV = variant.decoder.logits(variant.generate(sequence, ids[first:stop]))
            targets = torch.tensor(ids[first + 1 : stop + 1], device=logits_RV.device)
            total += float(cross_entropy(logits_RV, targets, reduction="sum"))
            count += stop - first
        fractions += attended_fractions(sequence)
    return LossResult(total / count, count, sum(fractions) / len(fractions) if fractions else None)


def attended_fractions(sequence: CachedSequence) -> list[float]:
    """Attended share of the context per decode row and retrieval head that selected."""
    return [
        attended / context
        for attended, context in zip(sequence.attended, sequence.contexts, strict=True)
    ]
