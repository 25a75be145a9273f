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
QUESTION_SHARE = 1 / 8  # of them too


@dataclass(frozen=True, slots=True)
class PlantedDocument:
    """Token ids, and positions (ascending) whose next token is part of an answer."""

    ids: list[int]
    answers: list[int]

    @property
    def questions(self) -> list[int]:
        """Positions between the answers: of what is asked after the first of them."""
        answers = set(self.answers)
        return [row for row in range(self.answers[0], self.answers[-1]) if row not in answers]


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

    An eighth are of questions, if there are several. The others lie anywhere in the last three
    quarters, where there is something far to attend to.
    """
    generator = torch.Generator().manual_seed(seed)
    answers = _picked(document.answers, int(ANSWER_SHARE * count), generator)
    questions = _picked(document.questions, int(QUESTION_SHARE * count), generator)
    rest = _anywhere(document, count - len(answers) - len(questions), generator)
    return torch.cat((answers, questions, rest)).sort().values


def row_kinds(document: PlantedDocument, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most `count` positions anywhere in the text, and as many of the answers."""
    generator = torch.Generator().manual_seed(seed)
    answers = _picked(document.answers, count, generator)
    return _anywhere(document, count, generator), answers.sort().values


def question_rows(document: PlantedDocument, count: int, seed: int) -> Tensor:
    """At most `count` positions of the questions, ascending; none if there is only one."""
    generator = torch.Generator().manual_seed(seed)
    return _picked(document.questions, count, generator).sort().values


def _picked(rows: list[int], count: int, generator: torch.Generator) -> Tensor:
    picked = torch.randperm(len(rows), generator=generator)[:count]
    return torch.tensor(rows, dtype=torch.int64)[picked]


def _anywhere(document: PlantedDocument, count: int, generator: torch.Generator) -> Tensor:
    first = len(document.ids) // 4
    span = max(document.answers[0] - first, 1)
    return torch.randperm(span, generator=generator)[:count].sort().values + first
