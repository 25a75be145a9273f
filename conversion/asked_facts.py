"""Text that ends in questions about facts planted far before them, each with its answer.

Torch-free. Calibration and fit look at the answers, distillation trains on them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tokenizers import Tokenizer

from conversion.code_facts import FACT_KINDS, fact_document
from conversion.text_source import encode_plain

FACT_COUNTS = (2, 4, 8, 16)  # per document, as far as there is room
ROOM_SHARE = 1 / 8  # of a document, which facts and questions may each take
LONGEST_LINE = "assert HARBOR_FALCON_QUOTA == [40213, 51324, 62435]\n"
SAFETY = 1.25  # lines of other names may take more tokens than this one


@dataclass(frozen=True, slots=True)
class AskedFacts:
    """Token ids, and where in them the answers stand, in order."""

    ids: list[int]
    answers: list[range]


def asked_facts(source_ids: list[int], tokenizer: Tokenizer, seed: int) -> AskedFacts | None:
    """Source text with facts planted in it and, at its end, a line for each that asks and answers.

    Prompts and answers are tokenised apart, as a server meets them: one is given, the other
    generated. The text and the first question are one prompt.

    Args:
        source_ids: text; the result is at most as long, and uses its beginning.
        seed: of how many facts of which kind, their places and the order of the questions.

    Returns:
        None where there is no room for two facts, or for the line of a single one.
    """
    tokens, rng = len(source_ids), random.Random(seed)
    line = SAFETY * len(encode_plain(tokenizer, LONGEST_LINE))
    counts = [count for count in FACT_COUNTS if count * line <= ROOM_SHARE * tokens]
    if not counts:
        return None
    facts = rng.choice(counts)
    room = tokens - (facts - 1) * int(line)  # fact_document leaves room for one question itself
    document = fact_document(source_ids, tokenizer, rng.choice(FACT_KINDS), facts, room, seed)
    ids, answers, before = list[int](), list[range](), document.text
    for question in rng.sample(document.questions, facts):
        asked = encode_plain(tokenizer, before + question.text)
        answer = encode_plain(tokenizer, question.answer)
        end = encode_plain(tokenizer, "\n")
        if len(ids) + len(asked) + len(answer) + len(end) > tokens:
            break  # its lines were longer than expected
        first = len(ids) + len(asked)
        answers.append(range(first, first + len(answer)))
        ids += [*asked, *answer, *end]
        before = ""
    return AskedFacts(ids, answers) if answers else None
