"""A number hidden in noise at a chosen depth, as in Landmark Attention (arXiv 2305.16300).

The version in code is one assignment between the lines of real source text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from conversion.code_facts import FactDocument, plain_facts
from conversion.errors import ConversionError
from conversion.evaluation.ruler.niah import NOISE
from conversion.evaluation.samples import PromptSample, continued_ids

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
GENERATED_TOKENS = 16


def passkey_sample(
    length: int, depth: float, number: int, count_tokens: Callable[[str], int]
) -> PromptSample:
    """One prompt.

    Args:
        length: prompt and generated tokens together, at most.
        depth: of the needle among the lines of noise, 0 to 1.
        number: of the sample, which draws the key.

    Raises:
        ConversionError: the length is too short.
    """
    key = str(random.Random(f"passkey {number}").randint(10_000, 99_999))

    def prompt(lines: int) -> str:
        before = round(depth * lines)
        middle = [NOISE] * before + [NEEDLE.format(key=key)] + [NOISE] * (lines - before)
        return "\n".join([INTRODUCTION, *middle, QUESTION])

    room = length - GENERATED_TOKENS - count_tokens(prompt(0))
    per_line = (count_tokens(prompt(20)) - count_tokens(prompt(0))) / 20
    lines = int(room / per_line)
    while lines > 0 and count_tokens(prompt(lines)) > length - GENERATED_TOKENS:
        lines -= 1
    if lines <= 0:
        raise ConversionError("passkey: the length is too short for one sample of it")
    return PromptSample(prompt(lines), (key,), GENERATED_TOKENS)


def code_passkey_document(
    source_ids: Sequence[int], tokenizer: Tokenizer, length: int, depth: float, number: int
) -> FactDocument:
    """One constant in source text at a depth of its lines.

    Args:
        source_ids: at least `length` token ids of source text.
        length: document, question and answer together, at most.

    Raises:
        ConversionError: the length is too short.
    """
    ((planted,), question) = plain_facts("constant", 1, number)[0]
    room = length - len(continued_ids(tokenizer, question.text + question.answer))
    kept = room - len(continued_ids(tokenizer, planted))
    while kept > 0:
        lines = tokenizer.decode(list(source_ids[:kept])).splitlines(keepends=True)[:-1]
        place = round(depth * len(lines))
        text = "".join([*lines[:place], planted, *lines[place:]])
        excess = len(continued_ids(tokenizer, text)) - room
        if excess <= 0 and lines:
            return FactDocument(text, (question,))
        kept -= max(excess, 1)
    raise ConversionError("code_passkey: the length is too short for one sample of it")
