"""Documents in which something must be retrieved, and the query positions that are looked at.

A planted document is text with either a needle that is repeated at its end
(`conversion.calibration`) or facts with questions and answers at its end (`conversion.code_facts`).
Positions of *answers* are those whose next token only far attention can predict.

Shapes: R sampled query positions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from conversion.calibration import NEEDLE_TOKENS, needle_document
from conversion.code_facts import FACT_KINDS, fact_document
from conversion.text_source import encode_plain

FACT_COUNTS = (2, 4, 8, 16)  # per document, as far as there is room
LONGEST_LINE = "assert HARBOR_FALCON_QUOTA == [40213, 51324, 62435]\n"
ROOM_SHARE = 1 / 8  # of a document, which facts and questions may each take
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
    line = 1.25 * len(encode_plain(tokenizer, LONGEST_LINE))
    counts = [count for count in FACT_COUNTS if count * line <= ROOM_SHARE * len(ids)]
    if seed % 2 == 0 and counts:
        found = _with_facts(ids, tokenizer, counts, int(line), seed)
        if found.answers:
            return found
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


def _with_facts(
    ids: list[int], tokenizer: Tokenizer, counts: list[int], line: int, seed: int
) -> PlantedDocument:
    rng = random.Random(seed)
    facts = rng.choice(counts)
    room = len(ids) - (facts - 1) * line  # fact_document leaves room for one question itself
    found = fact_document(ids, tokenizer, rng.choice(FACT_KINDS), facts, room, seed)
    made, answers = encode_plain(tokenizer, found.text), list[int]()
    for question in rng.sample(found.questions, facts):
        asked, answer = (
            encode_plain(tokenizer, question.text),
            encode_plain(tokenizer, question.answer),
        )
        first = len(made) + len(asked) - 1
        made += [*asked, *answer, *encode_plain(tokenizer, "\n")]
        answers += range(first, first + len(answer))
    # Lines longer than the longest known one are cut off with what they answer.
    return PlantedDocument(made[: len(ids)], [row for row in answers if row + 1 < len(ids)])
