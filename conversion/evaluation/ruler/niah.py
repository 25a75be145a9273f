"""RULER's eight needle-in-a-haystack tasks.

Rules, seeds and prompt wording are NVIDIA/RULER's (Apache-2.0, arXiv 2404.06654).
The haystack is a fixed line of noise, or prose, or nothing but needles with other keys.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from conversion.evaluation.haystack import Haystack, sentences
from conversion.evaluation.ruler.fitting import (
    SEED,
    SHORT_LENGTH,
    Draft,
    fitting_draft,
    largest_size,
)
from conversion.evaluation.samples import PromptSample
from conversion.evaluation.words import Words

ItemKind = Literal["words", "numbers", "uuids"]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text are"
)
GENERATED_TOKENS = 128
DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent of the sentences


@dataclass(frozen=True, slots=True)
class NiahRule:
    """What one of the tasks hides and asks for."""

    haystack: Literal["noise", "essay", "needle"]
    key_kind: ItemKind = "words"
    value_kind: ItemKind = "numbers"
    keys: int = 1
    values: int = 1  # per key
    queries: int = 1

    @property
    def keys_hidden(self) -> int:
        return max(self.keys, self.queries)


NIAH_RULES: dict[str, NiahRule] = {
    "niah_single_1": NiahRule("noise"),
    "niah_single_2": NiahRule("essay"),
    "niah_single_3": NiahRule("essay", value_kind="uuids"),
    "niah_multikey_1": NiahRule("essay", keys=4),
    "niah_multikey_2": NiahRule("needle"),
    "niah_multikey_3": NiahRule("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": NiahRule("essay", values=4),
    "niah_multiquery": NiahRule("essay", queries=4),
}


def niah_samples(
    name: str,
    count: int,
    length: int,
    count_tokens: Callable[[str], int],
    words: Words,
    haystack: Haystack,
) -> list[PromptSample]:
    """Samples of one task.

    Args:
        length: prompt and generated tokens together, at most.

    Raises:
        ConversionError: the length is too short.
    """
    rule = NIAH_RULES[name]
    task = NiahTask(rule, words, haystack)

    def fits(prompt: str) -> bool:
        return count_tokens(prompt) + GENERATED_TOKENS <= length

    step = 500 if rule.haystack == "essay" else 25 if length >= SHORT_LENGTH else 5
    per_unit = count_tokens(task.draft(step).prompt) / step
    high = max(int(length / per_unit * 3), step * 2)
    size = largest_size(task.draft, fits, step, high)
    drafts = [fitting_draft(task.draft, fits, size, step, name) for _ in range(count)]
    return [PromptSample(d.prompt, d.references, GENERATED_TOKENS) for d in drafts]


class NiahTask:
    """Draws samples of one rule from one generator."""

    def __init__(self, rule: NiahRule, words: Words, haystack: Haystack) -> None:
        self._rule = rule
        self._words = words
        self._haystack = haystack
        self._rng = random.Random(SEED)

    def draft(self, size: int) -> Draft:
        """A sample with `size` units of haystack: lines, or words of prose."""
        rule = self._rule
        keys: list[str] = []
        values: list[list[str]] = []
        for _ in range(rule.keys_hidden):
            keys.append(self._item(rule.key_kind))
            values.append([self._item(rule.value_kind) for _ in range(rule.values)])
        needles = [
            self._needle(key, value) for key, own in zip(keys, values, strict=True) for value in own
        ]
        random.Random(SEED).shuffle(needles)
        if rule.haystack == "essay":
            context = self._in_prose(size, needles)
        else:
            context = self._in_lines(size, needles)
        asked = self._rng.sample(range(rule.keys_hidden), rule.queries)
        query = enumerated([keys[i] for i in asked])
        references = tuple(value for i in asked for value in values[i])
        return Draft(self._prompt(context, query), references)

    def _item(self, kind: ItemKind) -> str:
        if kind == "numbers":
            return str(self._rng.randint(10**6, 10**7 - 1))
        if kind == "uuids":
            return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))
        return self._words.pair(self._rng)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self._rule.value_kind, key=key, value=value)

    def _in_prose(self, size: int, needles: list[str]) -> str:
        """Needles between sentences, in order, at distinct depths."""
        prose = sentences(self._haystack.text(size))
        depths = self._rng.sample(DEPTHS, len(needles))
        places = sorted(int(len(prose) * (depth / 100)) for depth in depths)
        parts: list[str] = []
        start = 0
        for place, needle in zip(places, needles, strict=True):
            parts += [" ".join(prose[start:place]), needle]
            start = place
        return " ".join([*parts, " ".join(prose[start:])])

    def _in_lines(self, size: int, needles: list[str]) -> str:
        """Needles between lines of noise, or between needles that nobody asks for."""
        lines = [self._line() for _ in range(size)]
        places = sorted(self._rng.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _line(self) -> str:
        if self._rule.haystack == "noise":
            return NOISE
        # The key is drawn before the value, as RULER's arguments are evaluated.
        key = self._item(self._rule.key_kind)
        return self._needle(key, self._item(self._rule.value_kind))

    def _prompt(self, context: str, query: str) -> str:
        template, kind = TEMPLATE, str(self._rule.value_kind)
        if self._rule.queries * self._rule.values == 1:
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
            kind = kind.removesuffix("s")
        return template.format(kind=kind, context=context, query=query)


def enumerated(items: list[str]) -> str:
    """ "a", or "a, b, and c" as RULER writes it."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + ", and " + items[-1]
