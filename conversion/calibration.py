"""Needle scores: how much each head attends from a late needle back to the same early needle.

RTPurbo (arXiv 2605.16928): one document with the same span at its start and its end; the score of a
head is the mean, over the tokens of the late span, of its dense post-softmax attention to all
tokens of the early one. The paper leaves the needle, the lengths and the aggregation open. Here the
needle is 32 random tokens that are not special, so that only copying predicts it; there are several
documents of each of several lengths, every one with a needle of its own, and a head's score is the
mean over all of them. Their spread is kept, so that a head that retrieves at one length only shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from conversion.document_attention import LayerView, attention_rows, watch_document
from conversion.errors import ConversionError
from conversion.head_roles import Scores
from conversion.parallel import Ranks
from engine.model.decoder import Decoder

NEEDLE_TOKENS = 32
MARGIN_TOKENS = 16  # of text before the early needle, so that it is no attention sink
LENGTHS = 3  # from the longest down, each half of the one before
SHORTEST_HALF = 1024  # tokens; no half is shorter


@dataclass(frozen=True, slots=True)
class NeedleDocument:
    """Token ids with `needle` ids planted at `early` and again at the very end."""

    ids: list[int]
    early: int
    needle: int  # tokens

    @property
    def late(self) -> int:
        return len(self.ids) - self.needle


@dataclass(slots=True)
class NeedleProbe:
    """Watches a dense run of a needle document; `layers` fills with scores [H], on the device."""

    document: NeedleDocument
    group_size: int
    layers: list[Tensor] = field(default_factory=list)

    def scores(self) -> Tensor:
        """Of all layers so far, float64 on the host."""
        return torch.stack(self.layers).double().cpu()

    def __call__(self, view: LayerView) -> None:
        start, needle = self.document.early, self.document.needle
        late, end = self.document.late, len(self.document.ids)
        rows_R = torch.arange(late, end, device=view.q_THD.device)
        shares = []
        for head in range(view.q_THD.shape[1]):
            log_RT = attention_rows(view, head, rows_R, self.group_size)
            shares.append(log_RT[:, start : start + needle].exp().sum(-1).mean())
        self.layers.append(torch.stack(shares))


def needle_document(ids: list[int], tokenizer: Tokenizer, needle: int, seed: int) -> NeedleDocument:
    """Overwrite two spans of `ids` with the same random tokens.

    Raises:
        ConversionError: the document cannot hold both spans apart.
    """
    if len(ids) < MARGIN_TOKENS + 4 * needle:
        raise ConversionError(
            f"a calibration document of {len(ids)} tokens is too short for two needles of {needle}"
        )
    special = set(tokenizer.get_added_tokens_decoder())
    ordinary = [i for i in range(tokenizer.get_vocab_size()) if i not in special]
    span = random.Random(seed).choices(ordinary, k=needle)
    middle = ids[MARGIN_TOKENS + needle : len(ids) - needle]
    return NeedleDocument([*ids[:MARGIN_TOKENS], *span, *middle, *span], MARGIN_TOKENS, needle)


def needle_lengths(tokens: int) -> tuple[int, ...]:
    """Lengths of documents, ascending: `tokens`, half of it and a quarter, as far as they make
    documents of a useful length."""
    halves = (tokens // 2**step for step in range(1, LENGTHS))
    return tuple(sorted({tokens, *(half for half in halves if half >= SHORTEST_HALF)}))


def needle_scores(
    decoder: Decoder,
    documents: list[NeedleDocument],
    advance: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
) -> list[Scores]:
    """Scores [document][layer][head] in [0, 1] under dense attention.

    Args:
        advance: called after each document of this process.
        ranks: every process takes its part of the documents and gets all scores.
    """
    ranks = ranks or Ranks()
    dense = replace(decoder.config, sparse=None)
    table_ZLH = torch.zeros(len(documents), dense.num_layers, dense.num_heads, dtype=torch.float64)
    for number in range(ranks.rank, len(documents), ranks.world):
        probe = NeedleProbe(documents[number], dense.group_size)
        watch_document(decoder, dense, documents[number].ids, probe)
        table_ZLH[number] = probe.scores()
        advance()
    scores: list[Scores] = ranks.summed(table_ZLH).tolist()
    return scores
