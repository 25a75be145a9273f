"""Questions about facts planted in Python code, for models that read code.

A document is real source text with statements such as `HARBOR_FALCON_LEVEL = 40213` between its
lines, at random depths (the code need not run); a question is the beginning of a line that only the
planted value completes. The other facts of a document are distractors of the same form. Torch-free.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from tokenizers import Tokenizer

from conversion.side_by_side import side_by_side
from conversion.text_source import TextSource, encode_plain

FactKind = Literal["constant", "dictionary", "list", "chain"]
FACT_KINDS: tuple[FactKind, ...] = get_args(FactKind)
ANSWER_DIGITS = 5
LIST_VALUES = 3
FIRST_WORDS = """AMBER BARREL CANDLE DELTA EMBER FALCON GARNET HARBOR IRON JUNIPER KETTLE LANTERN
MARBLE NICKEL ORCHID PEBBLE QUARRY RIVER SADDLE TIMBER URCHIN VELVET WILLOW YONDER ZEPHYR""".split()
SECOND_WORDS = """BUDGET COUNT DEPTH EDGE FACTOR GAIN HEIGHT INDEX KEY LEVEL MARGIN NUMBER OFFSET
PERIOD QUOTA RATIO SCALE TOTAL UNIT VALUE WIDTH""".split()


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: `text` ends right before the answer, which is `answer` exactly."""

    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class FactDocument:
    """A document and what can be asked of it. document + question is a prompt."""

    text: str
    questions: tuple[Question, ...]


def fact_document(
    source_ids: list[int], tokenizer: Tokenizer, kind: FactKind, facts: int, tokens: int, seed: int
) -> FactDocument:
    """Plant `facts` facts in source text so that document and question take `tokens` tokens.

    Args:
        source_ids: at least `tokens` token ids of source text.
        tokens: upper bound on the token ids of `text` + any question + its answer; the document is
            at most a few lines shorter.
        seed: of names, values and places.
    """
    rng = random.Random(seed)
    drawn = plain_facts(kind, facts, rng.randrange(2**31))
    planted, questions = [lines for lines, _ in drawn], tuple(question for _, question in drawn)
    tail = max(len(encode_plain(tokenizer, q.text + q.answer)) for q in questions)
    room = tokens - tail
    spent = len(encode_plain(tokenizer, "".join(line for group in planted for line in group)))
    filler = room - spent
    places = [[rng.random() for _ in group] for group in planted]
    while True:
        lines = tokenizer.decode(source_ids[:filler]).splitlines(keepends=True)[:-1]
        text = _plant(lines, planted, places)
        excess = len(encode_plain(tokenizer, text)) - room
        if excess <= 0:
            return FactDocument(text, questions)
        filler -= excess


def fact_documents(
    source: TextSource,
    tokenizer: Tokenizer,
    *,
    kind: FactKind,
    count: int,
    facts: int,
    tokens: int,
    seed: int = 0,
) -> list[FactDocument]:
    """`count` documents with `facts` questions each, no source file used twice.

    Raises:
        ConversionError: too little text.
    """
    texts = source.documents(tokenizer, count, tokens, seed)

    def make(number: int) -> FactDocument:
        own = seed * 1_000_003 + number
        return fact_document(texts[number], tokenizer, kind, facts, tokens, own)

    return side_by_side(make, range(count))


def plain_facts(kind: FactKind, count: int, seed: int) -> list[tuple[list[str], Question]]:
    """The lines of each fact, in the order in which they must stand, and its question."""
    rng = random.Random(seed)
    pairs = [f"{a}_{b}" for a in FIRST_WORDS for b in FIRST_WORDS if a != b]
    names = [f"{pair}_{rng.choice(SECOND_WORDS)}" for pair in rng.sample(pairs, 2 * count)]
    values = rng.sample(range(10 ** (ANSWER_DIGITS - 1), 10**ANSWER_DIGITS), LIST_VALUES * count)
    return [
        _fact(kind, names[number], names[count + number], list(map(str, values[number::count])))
        for number in range(count)
    ]


def _fact(kind: FactKind, name: str, alias: str, values: list[str]) -> tuple[list[str], Question]:
    value = values[0]
    if kind == "constant":
        return [f"{name} = {value}\n"], Question(f"assert {name} == ", value)
    if kind == "dictionary":
        place = f'REGISTRY["{name.lower()}"]'
        return [f"{place} = {value}\n"], Question(f"assert {place} == ", value)
    if kind == "list":
        lines = [f"{name}.append({value})\n" for value in values]
        return lines, Question(f"assert {name} == [", ", ".join(values) + "]")
    lines = [f"{name} = {value}\n", f"{alias} = {name}\n"]
    return lines, Question(f"assert {alias} == ", value)


def _plant(lines: list[str], planted: list[list[str]], places: list[list[float]]) -> str:
    """Put every planted line before the source line at its depth; a fact's lines keep order."""
    before: dict[int, list[str]] = {}
    for group, depths in zip(planted, places, strict=True):
        for line, depth in zip(group, sorted(depths), strict=True):
            before.setdefault(int(depth * len(lines)), []).append(line)
    return "".join("".join(before.get(i, [])) + line for i, line in enumerate(lines))
