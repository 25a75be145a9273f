"""What is asked of a model: prompts to be continued, and documents with exact answers.

Torch-free. A task makes samples; a subject (`in_process`, `http_endpoint`) scores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from conversion.code_facts import FactDocument
from conversion.text_source import encode_plain


@dataclass(frozen=True, slots=True)
class PromptSample:
    """A prompt whose greedy continuation must contain every reference."""

    prompt: str
    references: tuple[str, ...]
    generated_tokens: int  # how many are generated at most


Sample = PromptSample | FactDocument
"""A FactDocument is scored per question: its answer exactly, or not."""


def reference_score(text: str, references: Sequence[str]) -> float:
    """Share of the references that `text` contains, in whatever case (RULER's string match)."""
    lowered = text.lower()
    return sum(reference.lower() in lowered for reference in references) / len(references)


class TokenCounter:
    """Counts the tokens of a prompt as a server would: with the tokenizer's own special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> int:
        return len(prompt_ids(self._tokenizer, text))


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of the beginning of a sequence."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=True).ids
    return ids


def continued_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of text in the middle of a sequence."""
    return encode_plain(tokenizer, text)
