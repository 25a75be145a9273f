"""Names of planted facts: unlike each other in some documents, near twins in others."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHARED = 0.6  # share of the documents whose names are made of the same few words
FEWEST_WORDS, MOST_WORDS = 2, 25  # of such a document, for each place of a name
RANDOM_LETTERS = 0.3  # share of the words that are no words
PLAIN = 0.35  # share of the documents whose names are a plain word or two
ENOUGH_PLAIN = 64  # words; fewer are left alone


class NameMaker:
    """Names of one document, none of them twice.

    A model that tells names apart by their first word answers most questions about names drawn
    freely, and confuses the rest for ever; among names that share words it has to read them whole.
    A name of one token is the easiest to carry from one look-up to the next: there a model finds
    out that it can.
    """

    def __init__(
        self, words: NDArray[np.str_], rng: np.random.Generator, plain: Sequence[str] = ()
    ) -> None:
        """
        Args:
            words: upper-case words to draw from.
            rng: of every draw; used on by `name`.
            plain: words that are one token each, of which the names of some documents are made.
        """
        self._words = words
        self._rng = rng
        self._plain_words = 0  # of a name; 0: names are not plain
        self._plain = plain
        if len(plain) >= ENOUGH_PLAIN and rng.random() < PLAIN:
            self._plain_words = int(rng.integers(1, 3))
        self._used: set[str] = set()
        self._pools: list[list[str]] | None = None
        if rng.random() < SHARED:
            sizes = rng.integers(FEWEST_WORDS, MOST_WORDS + 1, int(rng.integers(1, 4)))
            self._pools = [[self._word() for _ in range(size)] for size in sizes]

    def name(self) -> str:
        """One to three words joined by underscores."""
        while True:
            name = "_".join(self._parts())
            if name not in self._used:
                self._used.add(name)
                return name
            if self._plain_words == 1 and len(self._used) >= len(self._plain) // 2:
                self._plain_words = 2
            if self._pools is not None:  # more words, so that names never run out
                self._pools[int(self._rng.integers(len(self._pools)))].append(self._word())

    def _parts(self) -> list[str]:
        if self._plain_words:
            places = self._rng.integers(0, len(self._plain), self._plain_words)
            return [self._plain[place] for place in places]
        if self._pools is None:
            return [self._word() for _ in range(int(self._rng.integers(1, 4)))]
        return [pool[int(self._rng.integers(len(pool)))] for pool in self._pools]

    def _word(self) -> str:
        if self._rng.random() < RANDOM_LETTERS:
            letters = self._rng.choice(list(string.ascii_uppercase), int(self._rng.integers(3, 8)))
            return "".join(letters)
        return str(self._words[int(self._rng.integers(len(self._words)))])
