"""Planted documents by number, without end, from text that does end.

The first documents of the text are held out, for measuring; training reads the others, again and
again if it must, each time with other facts and needles in them. A document is a function of the
seed and its number, so a resumed run sees what an uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from tokenizers import Tokenizer

from conversion.attention_samples import PlantedDocument, planted_document
from conversion.errors import ConversionError
from conversion.side_by_side import ahead
from conversion.text_source import TextSource


class DocumentFeed:
    """Planted documents of `tokens` tokens."""

    def __init__(
        self, source: TextSource, tokenizer: Tokenizer, tokens: int, seed: int, held_out: int
    ) -> None:
        """
        Args:
            held_out: documents that training never reads, at least 1.
        """
        self.tokens = tokens
        self._source = source
        self._tokenizer = tokenizer
        self._seed = seed
        self._held_out = held_out

    def held_out(self) -> list[PlantedDocument]:
        """The documents for measuring; raises ConversionError if there is too little text."""
        texts = self._source.documents(self._tokenizer, self._held_out, self.tokens, self._seed)
        return [self._plant(ids, number) for number, ids in enumerate(texts)]

    def training(self, first: int, stride: int = 1) -> Iterator[PlantedDocument]:
        """Documents `first`, `first + stride`, ... for training.

        Raises:
            ConversionError: all text is held out.
        """
        numbered = enumerate(self._texts())
        wanted = islice(numbered, first, None, stride)
        return ahead(lambda pair: self._plant(pair[1], self._held_out + pair[0]), wanted)

    def _texts(self) -> Iterator[list[int]]:
        """Texts that are not held out, again and again."""
        while True:
            left = False
            texts = self._source.stream(self._tokenizer, self.tokens, self._seed)
            for ids in islice(texts, self._held_out, None):
                left = True
                yield ids
            if not left:
                raise ConversionError(
                    f"{self._source.description}: too little text, {self._held_out} documents of "
                    f"{self.tokens} tokens are held out and none is left to train on"
                )

    def _plant(self, ids: list[int], number: int) -> PlantedDocument:
        return planted_document(ids, self._tokenizer, 2 * 1_000_003 * self._seed + number)
