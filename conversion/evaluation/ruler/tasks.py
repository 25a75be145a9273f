"""The eleven RULER tasks that need no download; qa_1 and qa_2 need SQuAD and HotpotQA."""

from __future__ import annotations

from collections.abc import Callable

from conversion.evaluation.haystack import Haystack
from conversion.evaluation.ruler.niah import NIAH_RULES, niah_samples
from conversion.evaluation.ruler.variable_tracking import variable_tracking_samples
from conversion.evaluation.ruler.word_counts import cwe_samples, fwe_samples
from conversion.evaluation.samples import PromptSample
from conversion.evaluation.words import Words

RULER_TASKS = (*NIAH_RULES, "vt", "cwe", "fwe")
PAPER_COLUMNS = {
    "S": ("niah_single_1", "niah_single_2", "niah_single_3"),
    "mK": ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    "mV": ("niah_multivalue",),
    "mQ": ("niah_multiquery",),
    "VT": ("vt",),
    "CWE": ("cwe",),
    "FWE": ("fwe",),
}
"""The columns of arXiv 2605.16928's tables, but for SQuAD and HotPot."""


def ruler_samples(
    name: str,
    count: int,
    length: int,
    count_tokens: Callable[[str], int],
    words: Words,
    haystack: Haystack,
) -> list[PromptSample]:
    """Samples of one task, the same for the same tokenizer, haystack and length.

    Args:
        length: prompt and generated tokens together, at most.

    Raises:
        ConversionError: the length is too short.
    """
    if name in NIAH_RULES:
        return niah_samples(name, count, length, count_tokens, words, haystack)
    if name == "vt":
        return variable_tracking_samples(count, length, count_tokens)
    if name == "cwe":
        return cwe_samples(count, length, count_tokens, words)
    assert name == "fwe"
    return fwe_samples(count, length, count_tokens)
