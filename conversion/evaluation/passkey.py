"""A number hidden in noise at a chosen depth, as in Landmark Attention (arXiv 2305.16300)."""

from __future__ import annotations

import random
from collections.abc import Callable

from conversion.errors import ConversionError
from conversion.evaluation.ruler.niah import NOISE
from conversion.evaluation.samples import PromptSample

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
