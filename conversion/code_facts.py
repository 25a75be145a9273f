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

from conversion.text_source import TextSource

FactKind = Literal["constant", "dictionary", "chain"]
FACT_KINDS: tuple[FactKind, ...] = get_args(FactKind)
ANSWER_DIGITS = 5
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
    planted, questions = _facts(rng, kind, facts)
    tail = max(len(_encode(tokenizer, q.text + q.answer)) for q in questions)
    room = tokens - tail
    spent = len(_encode(tokenizer, "".join(line for group in planted for line in group)))
    filler = room - spent
    places = [[rng.random() for _ in group] for group in planted]
    while True:
        lines = tokenizer.decode(source_ids[:filler]).splitlines(keepends=True)[:-1]
        text = _plant(lines, planted, places)
        excess = len(_encode(tokenizer, text)) - room
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
    return [
        fact_document(ids, tokenizer, kind, facts, tokens, seed=seed * 1_000_003 + number)
        for number, ids in enumerate(texts)
    ]


def _facts(
    rng: random.Random, kind: FactKind, count: int
) -> tuple[list[list[str]], tuple[Question, ...]]:
    """The lines of each fact, in the order in which they must stand, and the questions."""
    pairs = [f"{a}_{b}" for a in FIRST_WORDS for b in FIRST_WORDS if a != b]
    names = [f"{pair}_{rng.choice(SECOND_WORDS)}" for pair in rng.sample(pairs, 2 * count)]
    values = [str(value) for value in rng.sample(range(10 ** (ANSWER_DIGITS - 1), 100_000), count)]
    planted, questions = [], []
    for name, alias, value in zip(names[:count], names[count:], values, strict=True):
        if kind == "constant":
            planted.append([f"{name} = {value}\n"])
            questions.append(Question(f"assert {name} == ", value))
        elif kind == "dictionary":
            planted.append([f'REGISTRY["{name.lower()}"] = {value}\n'])
            questions.append(Question(f'assert REGISTRY["{name.lower()}"] == ', value))
        else:
            planted.append([f"{name} = {value}\n", f"{alias} = {name}\n"])
            questions.append(Question(f"assert {alias} == ", value))
    return planted, tuple(questions)


def _plant(lines: list[str], planted: list[list[str]], places: list[list[float]]) -> str:
    """Put every planted line before the source line at its depth; a fact's lines keep order."""
    before: dict[int, list[str]] = {}
    for group, depths in zip(planted, places, strict=True):
        for line, depth in zip(group, sorted(depths), strict=True):
            before.setdefault(int(depth * len(lines)), []).append(line)
    return "".join("".join(before.get(i, [])) + line for i, line in enumerate(lines))


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
