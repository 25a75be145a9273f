"""What stage 2 trains on: long sequences that end in a response.

From text, half of the sequences end in questions about facts that were planted far before them, so
that the response can only be predicted by retrieving; the others are plain text, whose last tokens
stand for a response. From a JSONL file of the user, what its rows say. Torch-free.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from conversion.asked_facts import asked_facts
from conversion.errors import ConversionError
from conversion.side_by_side import ahead
from conversion.text_source import TextSource, encode_plain


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of a sequence; the last `response` of them are what a model would generate."""

    ids: list[int]
    response: int


def text_samples(
    source: TextSource,
    tokenizer: Tokenizer,
    *,
    tokens: int,
    response: int,
    facts_share: float,
    seed: int,
) -> Iterator[Sample]:
    """Sequences of exactly `tokens` tokens for as long as there is text."""
    rng = random.Random(seed)

    def make(drawn: tuple[int, list[int], bool]) -> Sample:
        number, ids, with_facts = drawn
        own = seed * 1_000_003 + number
        return Sample(_with_facts(ids, tokenizer, own) if with_facts else ids, response)

    numbered = enumerate(source.stream(tokenizer, tokens, seed))
    return ahead(make, ((number, ids, rng.random() < facts_share) for number, ids in numbered))


def _with_facts(source_ids: list[int], tokenizer: Tokenizer, seed: int) -> list[int]:
    """As many tokens that end in questions and answers; the text as it is if there is no room."""
    asked = asked_facts(source_ids, tokenizer, seed)
    if asked is None:
        return source_ids
    # What is missing is text that the facts' document has not used, in front of it.
    return source_ids[len(asked.ids) :] + asked.ids


@dataclass(frozen=True, slots=True)
class JsonlRows:
    """A file of rows {"prompt": ..., "response": ...} or {"text": ...}, checked, not kept."""

    path: Path
    starts: tuple[int, ...]  # byte offset of each row
    lines: tuple[int, ...]  # its line number, from 1

    @classmethod
    def open(cls, path: Path) -> JsonlRows:
        """Check every row.

        Raises:
            ConversionError: the file is not readable or has no row; a row is none, with its line.
        """
        starts, lines, offset = [], [], 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        _parse(path, number, line)
                        starts.append(offset)
                        lines.append(number)
                    offset += len(line)
        except OSError as error:
            raise ConversionError(f"{path}: not readable ({error.strerror})") from None
        if not starts:
            raise ConversionError(f"{path}: no row in it")
        return cls(path, tuple(starts), tuple(lines))

    def samples(
        self, tokenizer: Tokenizer, *, tokens: int, response: int, seed: int
    ) -> Iterator[Sample]:
        """All rows once, in an order drawn from `seed`.

        A text is cut behind `tokens` tokens; a prompt with its response loses its beginning. Of a
        longer response the last `response` tokens count, and the rest is taken as prompt.

        Raises:
            ConversionError: a row has too few tokens, with its line.
        """
        order = list(range(len(self.starts)))
        random.Random(seed).shuffle(order)
        with self.path.open("rb") as file:
            for place in order:
                file.seek(self.starts[place])
                row = _parse(self.path, self.lines[place], file.readline())
                ids, label = _tokens(row, tokenizer, tokens, response)
                if not 0 < label < len(ids):
                    raise ConversionError(
                        f"{self.path} line {self.lines[place]}: too short, its {len(ids)} tokens "
                        f"do not hold a prompt and {'a' if label < 1 else label} response tokens"
                    )
                yield Sample(ids, label)


def _tokens(
    row: Sequence[str], tokenizer: Tokenizer, tokens: int, response: int
) -> tuple[list[int], int]:
    """Token ids of a row and how many of them are response."""
    if len(row) == 1:
        return encode_plain(tokenizer, row[0])[:tokens], response
    # A prompt begins as the server begins it.
    prompt = tokenizer.encode(row[0]).ids
    answer = encode_plain(tokenizer, row[1])
    return [*prompt, *answer][-tokens:], min(response, len(answer))


def _parse(path: Path, number: int, line: bytes) -> tuple[str, ...]:
    """(text,) or (prompt, response)."""
    try:
        row = json.loads(line)
    except ValueError:
        raise ConversionError(f"{path} line {number}: not JSON") from None
    if isinstance(row, dict):
        for names in (("prompt", "response"), ("text",)):
            values = tuple(v for v in map(row.get, names) if isinstance(v, str) and v)
            if len(values) == len(names):
                return values
    raise ConversionError(
        f'{path} line {number}: needs "prompt" and "response", or "text", as strings'
    )
