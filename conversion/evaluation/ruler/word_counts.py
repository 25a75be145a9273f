"""RULER's aggregation tasks: common words of a list (cwe), frequent coded words (fwe).

Rules, seeds and prompt wording are NVIDIA/RULER's (Apache-2.0, arXiv 2404.06654).
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable

from conversion.errors import ConversionError
from conversion.evaluation.ruler.fitting import (
    SEED,
    SHORT_LENGTH,
    Draft,
    fitting_draft,
    largest_size,
)
from conversion.evaluation.samples import PromptSample
from conversion.evaluation.words import Words

CWE_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
CWE_COMMON = 10
CWE_GENERATED_TOKENS = 120
CWE_STEP = 10
CWE_PROBE = 4096  # words of the text whose tokens bound the search
FWE_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text? Answer: According to the coded text above, the three most frequently appeared words are:"
)
FWE_GENERATED_TOKENS = 50
FWE_LETTERS = 6
ZETA_2 = math.pi**2 / 6  # ranks follow a zeta distribution with exponent 2


def cwe_samples(
    count: int, length: int, count_tokens: Callable[[str], int], words: Words
) -> list[PromptSample]:
    """Ten words that stand more often in a numbered list than all others, after a solved example.

    Raises:
        ConversionError: the length is too short.
    """
    rng = random.Random(SEED)
    singles = words.shuffled(SEED)
    short = length < SHORT_LENGTH
    example_rule, rule = ((20, 3, 1), (6, 1)) if short else ((40, 10, 3), (30, 3))

    def numbered(size: int, often: int, seldom: int) -> tuple[str, list[str]]:
        drawn = words.distinct(rng, singles, size)
        listed = drawn[:CWE_COMMON] * often + drawn[CWE_COMMON:] * seldom
        random.Random(SEED).shuffle(listed)
        return CWE_TEMPLATE.format(context=_numbered(listed)), drawn[:CWE_COMMON]

    def make(size: int) -> Draft:
        example, answer = numbered(*example_rule)
        prompt, references = numbered(size, *rule)
        return Draft(f"{example} {_numbered(answer)}\n{prompt}", tuple(references))

    def fits(prompt: str) -> bool:
        return count_tokens(prompt) + CWE_GENERATED_TOKENS <= length

    per_word = count_tokens(make(CWE_PROBE).prompt) / CWE_PROBE
    high = max(int(length // per_word) * 2, CWE_STEP * 2)
    size = largest_size(make, fits, CWE_STEP, high)
    drafts = [fitting_draft(make, fits, size, CWE_STEP, "cwe") for _ in range(count)]
    return [PromptSample(d.prompt, d.references, CWE_GENERATED_TOKENS) for d in drafts]


def fwe_samples(count: int, length: int, count_tokens: Callable[[str], int]) -> list[PromptSample]:
    """The three most frequent of random six-letter words whose counts fall with rank squared.

    Raises:
        ConversionError: the length is too short.
    """
    room = length - FWE_GENERATED_TOKENS
    too_short = ConversionError("fwe: the length is too short for one sample of it")
    if room // 50 < 4:  # dots and three words to ask for
        raise too_short
    step = room // 32
    rng = random.Random(SEED)
    vocabulary = _coded_words(rng, room // 50)
    size = room // FWE_LETTERS
    while count_tokens(_coded_text(vocabulary, size).prompt) < room:
        size += step
    size -= step
    samples = []
    for _ in range(count):
        vocabulary, own = _coded_words(rng, room // 50), size
        while count_tokens(_coded_text(vocabulary, own).prompt) > room:
            own -= step
            if own <= 0:
                raise too_short
        draft = _coded_text(vocabulary, own)
        samples.append(PromptSample(draft.prompt, draft.references, FWE_GENERATED_TOKENS))
    return samples


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def _coded_words(rng: random.Random, count: int) -> list[str]:
    """Words by rank; the most frequent one is dots, which the question says to ignore."""

    def word() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=FWE_LETTERS))

    words = [word() for _ in range(count)]
    while len(set(words)) < count:
        words.append(word())
    words = sorted(set(words))
    random.Random(SEED).shuffle(words)
    return ["...", *words[1:]]


def _coded_text(vocabulary: list[str], size: int) -> Draft:
    """About `size` words; rank k stands floor(size / (k² ζ(2))) times."""
    words = [
        word
        for rank, word in enumerate(vocabulary, start=1)
        for _ in range(int(size * float(rank) ** -2.0 / ZETA_2))
    ]
    random.Random(SEED).shuffle(words)
    return Draft(FWE_TEMPLATE.format(context=" ".join(words)), tuple(vocabulary[1:4]))
