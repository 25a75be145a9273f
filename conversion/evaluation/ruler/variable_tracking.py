"""RULER's variable tracking: one chain of assignments in noise, after a solved example.

Rules, seeds and prompt wording are NVIDIA/RULER's (Apache-2.0, arXiv 2404.06654).
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from conversion.evaluation.ruler.fitting import (
    SEED,
    SHORT_LENGTH,
    Draft,
    fitting_draft,
    largest_size,
)
from conversion.evaluation.ruler.niah import NOISE
from conversion.evaluation.samples import PromptSample

HOPS = 4
TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {query}, they are: "
)
GENERATED_TOKENS = 30
EXAMPLE_TOKENS = 500
EXAMPLE_STEP = 5
EXAMPLE_VALUE = "12345"
NAME = "vt"


def variable_tracking_samples(
    count: int, length: int, count_tokens: Callable[[str], int]
) -> list[PromptSample]:
    """Samples of at most `length` tokens, generated ones included.

    Raises:
        ConversionError: the length is too short.
    """
    task = TrackingTask(count_tokens)

    def fits_with(extra: int) -> Callable[[str], bool]:
        return lambda prompt: count_tokens(prompt) + extra + GENERATED_TOKENS <= length

    step = 10 if length >= SHORT_LENGTH else 5
    size = task.search(task.draft, fits_with(count_tokens(task.example)), length, step)
    drafts = [
        fitting_draft(task.draft_with_example, fits_with(0), size, step, NAME) for _ in range(count)
    ]
    return [PromptSample(d.prompt, d.references, GENERATED_TOKENS) for d in drafts]


class TrackingTask:
    """Draws samples, and once the example that precedes them, from one pair of generators."""

    def __init__(self, count_tokens: Callable[[str], int]) -> None:
        self._rng = random.Random(SEED)
        self._values = np.random.RandomState(SEED)
        self._count_tokens = count_tokens
        self.example = self._make_example()

    def draft(self, size: int) -> Draft:
        """A chain of five-letter names in `size` lines of noise."""
        names = self._draw_names(5)
        return self._assemble(size, names, str(self._values.randint(10000, 99999)))

    def draft_with_example(self, size: int) -> Draft:
        """The same behind the example, which has new names and a new value every time."""
        draft = self.draft(size)
        return Draft(self._renamed_example() + "\n" + draft.prompt, draft.references)

    def search(
        self, make: Callable[[int], Draft], fits: Callable[[str], bool], length: int, step: int
    ) -> int:
        """Lines of noise that fit."""
        per_line = self._count_tokens(make(step).prompt) / step
        return largest_size(make, fits, step, max(int(length / per_line * 3), step * 2))

    def _draw_names(self, letters: int) -> list[str]:
        names = [self._name(letters) for _ in range(HOPS + 1)]
        while len(set(names)) < HOPS + 1:
            names.append(self._name(letters))
        return list(dict.fromkeys(names))

    def _name(self, letters: int) -> str:
        return "".join(self._rng.choices(string.ascii_uppercase, k=letters))

    def _assemble(self, size: int, names: list[str], value: str) -> Draft:
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {new} = VAR {old} " for old, new in pairwise(names)]
        lines = [NOISE] * size
        places = sorted(self._rng.sample(range(size), len(chain)))
        for shift, (place, statement) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + shift, statement)
        context = "\n".join(lines).replace(". \n", ".\n")
        prompt = TEMPLATE.format(context=context, query=value, count=len(names))
        return Draft(prompt, tuple(names))

    def _make_example(self) -> str:
        def example(size: int) -> Draft:
            return self._assemble(size, self._draw_names(3), EXAMPLE_VALUE)

        def fits(prompt: str) -> bool:
            return self._count_tokens(prompt) <= EXAMPLE_TOKENS

        size = self.search(example, fits, EXAMPLE_TOKENS, EXAMPLE_STEP)
        draft = fitting_draft(example, fits, size, EXAMPLE_STEP, NAME)
        return f"{draft.prompt} {' '.join(draft.references)}\n"

    def _renamed_example(self) -> str:
        text = self.example
        for name in self.example.split()[-HOPS - 1 :]:
            text = text.replace(name, self._name(len(name)))
        return text.replace(EXAMPLE_VALUE, str(self._values.randint(10000, 99999)))
