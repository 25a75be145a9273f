"""English words of the RULER tasks, from the word lists of the package `wonderwords`.

RULER turns to a dictionary of its own for word counts beyond these lists (past about 128K tokens);
pairs of an adjective and a noun stand in for it here.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from itertools import accumulate

from conversion.errors import ConversionError


@dataclass(frozen=True)
class Words:
    """Word lists in the order of their files."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]

    @classmethod
    def load(cls) -> Words:
        """
        Raises:
            ConversionError: wonderwords is not installed.
        """
        try:
            assets = resources.files("wonderwords.assets")
        except ModuleNotFoundError:
            raise ConversionError(
                "RULER tasks need the package wonderwords: pip install 'rtpurbo[eval]'"
            ) from None

        def read(name: str) -> tuple[str, ...]:
            text = (assets / f"{name}list.txt").read_text(encoding="utf-8")
            return tuple(line.rstrip() for line in text.splitlines())

        return cls(read("noun"), read("adjective"), read("verb"))

    def pair(self, rng: random.Random) -> str:
        """An adjective-noun key, drawn as from the sorted list of all different pairs."""
        starts, families = self._families
        number = rng.choice(range(starts[-1]))
        place = bisect_right(starts, number) - 1
        rank = number - starts[place]
        if len(families[place]) == 1:
            return f"{families[place][0]}-{self._sorted_nouns[rank]}"
        return self._pairs_of(families[place])[rank]

    def shuffled(self, seed: int) -> list[str]:
        """All single words, no word twice, in an order drawn from `seed`."""
        words = sorted({*self.nouns, *self.adjectives, *self.verbs})
        random.Random(seed).shuffle(words)
        return words

    def distinct(self, rng: random.Random, singles: list[str], count: int) -> list[str]:
        """`count` different words: single ones if there are enough, else pairs."""
        if count <= len(singles):
            return rng.sample(singles, count)
        pairs: dict[str, None] = {}
        while len(pairs) < count:
            pairs[self.pair(rng)] = None
        return list(pairs)

    @cached_property
    def _families(self) -> tuple[list[int], list[list[str]]]:
        """Adjectives in the order of their pairs, and the rank of each family's first pair.

        The sorted list of six million pairs is never built: pairs of an adjective stand together,
        except where one is a prefix of another ("teeny", "teeny-tiny"); these share a family.
        """
        families: list[list[str]] = []
        for adjective in sorted(set(self.adjectives), key=lambda word: word + "-"):
            if families and adjective.startswith(families[-1][0] + "-"):
                families[-1].append(adjective)
            else:
                families.append([adjective])
        sizes = [
            len(self._sorted_nouns) if len(family) == 1 else len(self._pairs_of(family))
            for family in families
        ]
        return [0, *accumulate(sizes)], families

    def _pairs_of(self, family: list[str]) -> list[str]:
        return sorted({f"{adjective}-{noun}" for adjective in family for noun in self.nouns})

    @cached_property
    def _sorted_nouns(self) -> list[str]:
        return sorted(set(self.nouns))
