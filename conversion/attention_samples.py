"""Documents in which something must be retrieved, and the query positions that are looked at.

A planted document is text with either a needle (`conversion.calibration`), which is repeated at its
end, or facts (`conversion.asked_facts`), which are asked for and answered there. Positions of
*answers* are those whose next token only far attention can predict.

Shapes: R sampled query positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from conversion.asked_facts import asked_facts
from conversion.calibration import NEEDLE_TOKENS, needle_document

ANSWER_SHARE = 1 / 4  # of sampled queries


@dataclass(frozen=True, slots=True)
class PlantedDocument:
    """Token ids, and positions (ascending) whose next token is part of an answer."""

    ids: list[int]
    answers: list[int]


def planted_document(ids: list[int], tokenizer: Tokenizer, seed: int) -> PlantedDocument:
    """Text with facts if `seed` is even and they fit, else with a needle.

    Args:
        ids: text; the result is at most as long.
        seed: of what is planted and where.

    Raises:
        ConversionError: the text is too short even for a needle.
    """
    found = asked_facts(ids, tokenizer, seed) if seed % 2 == 0 else None
    if found is not None:
        rows = [place - 1 for answer in found.answers for place in answer]
        return PlantedDocument(found.ids, rows)
    needle = needle_document(ids, tokenizer, NEEDLE_TOKENS, seed)
    return PlantedDocument(needle.ids, list(range(needle.late, len(needle.ids) - 1)))


def sample_rows(document: PlantedDocument, count: int, seed: int) -> Tensor:
    """`count` query positions for training, int64, ascending: a quarter of them at answers.

    The others lie anywhere in the last three quarters, where there is something far to attend to.
    """
    generator = torch.Generator().manual_seed(seed)
    answers = torch.tensor(document.answers)
    picked = torch.randperm(len(answers), generator=generator)[: int(ANSWER_SHARE * count)]
    rest = _anywhere(document, count - len(picked), generator)
    return torch.cat((answers[picked].sort().values, rest)).sort().values


def row_kinds(document: PlantedDocument, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most `count` positions anywhere in the text, and as many of the answers."""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.tensor(document.answers)
    picked = torch.randperm(len(answers), generator=generator)[:count]
    return _anywhere(document, count, generator), answers[picked].sort().values


def _anywhere(document: PlantedDocument, count: int, generator: torch.Generator) -> Tensor:
    first = len(document.ids) // 4
    span = max(document.answers[0] - first, 1)
    return torch.randperm(span, generator=generator)[:count].sort().values + first
