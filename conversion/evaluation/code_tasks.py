"""RULER's task families in Python code, with exact answers, for models that read code only.

    code_constant, code_dictionary   single and multi-key needles: one assignment among others
    code_chain                       variable tracking: an alias of a constant
    code_list                        multi-value: three appended values, all of them in order
    code_multivalue                  the same lists, each value asked by itself
    code_multiquery                  four constants asked one after the other in one go
    code_frequent                    aggregation: the word that a repeated line ends with most often
    code_passkey                     one constant at a given depth

Documents are real source text, so nothing but the planted lines is in their own language's style.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, get_args

from tokenizers import Tokenizer

from conversion.code_facts import (
    FIRST_WORDS,
    LIST_VALUES,
    FactDocument,
    FactKind,
    Question,
    fact_documents,
    plain_facts,
)
from conversion.errors import ConversionError
from conversion.evaluation.samples import continued_ids, prompt_ids
from conversion.side_by_side import side_by_side
from conversion.text_source import TextSource

CodeTask = Literal[
    "code_constant",
    "code_dictionary",
    "code_list",
    "code_chain",
    "code_multivalue",
    "code_multiquery",
    "code_frequent",
]
CODE_TASKS: tuple[CodeTask, ...] = get_args(CodeTask)
QUERIES = 4  # of code_multiquery, as in RULER
FREQUENT_LINES = 12  # with the most frequent word
OTHER_LINES = 2  # with each other word
_KINDS: dict[str, FactKind] = {
    "code_constant": "constant",
    "code_dictionary": "dictionary",
    "code_list": "list",
    "code_chain": "chain",
    "code_multivalue": "list",
    "code_multiquery": "constant",
}


def code_documents(
    task: CodeTask,
    source: TextSource,
    tokenizer: Tokenizer,
    *,
    count: int,
    facts: int,
    length: int,
    seed: int,
) -> list[FactDocument]:
    """`count` documents with `facts` facts each; for code_frequent with so many other words.

    Args:
        length: document, question and answer together, in tokens, at most.

    Raises:
        ConversionError: too little text, or the length is too short for so many facts.
    """
    room = length - len(prompt_ids(tokenizer, ""))  # the tokenizer's own special tokens
    if task == "code_frequent":
        texts = source.documents(tokenizer, count, room, seed)

        def make(number: int) -> FactDocument:
            own = seed * 1_000_003 + number
            return _frequent_document(texts[number], tokenizer, facts, room, own)

        return side_by_side(make, range(count))
    if not has_room(task, tokenizer, facts, length):
        raise ConversionError(f"{task}: the length is too short for {facts} facts")
    documents = fact_documents(
        source,
        tokenizer,
        kind=_KINDS[task],
        count=count,
        facts=max(facts, _least_facts(task)),
        tokens=room - _extra_tokens(task, tokenizer, seed),
        seed=seed,
    )
    if task == "code_multivalue":
        return [_value_by_value(document) for document in documents]
    if task == "code_multiquery":
        return [_in_one_go(document) for document in documents]
    return documents


def has_room(task: CodeTask, tokenizer: Tokenizer, facts: int, length: int) -> bool:
    """Whether so many facts take at most three quarters of a document."""
    if task == "code_frequent":
        longest = max(len(continued_ids(tokenizer, _event(word))) for word in FIRST_WORDS)
        needed = longest * (FREQUENT_LINES + OTHER_LINES * facts)
    else:
        planted = plain_facts(_KINDS[task], max(facts, _least_facts(task)), 0)
        text = "".join(line for lines, _ in planted for line in lines)
        needed = len(continued_ids(tokenizer, text))
    return 4 * needed <= 3 * length


def code_passkey_documents(
    source: TextSource, tokenizer: Tokenizer, *, count: int, depth: float, length: int, seed: int
) -> list[FactDocument]:
    """One constant at `depth` (0 to 1) of the lines of each document.

    Raises:
        ConversionError: too little text, or the length is too short.
    """
    room = length - len(prompt_ids(tokenizer, ""))
    texts = source.documents(tokenizer, count, room, seed)

    def make(number: int) -> FactDocument:
        ((line,), question) = plain_facts("constant", 1, seed * 1_000_003 + number)[0]
        tail = len(continued_ids(tokenizer, question.text + question.answer))
        text = _plant(texts[number], tokenizer, [(depth, line)], room - tail)
        return FactDocument(text, (question,))

    return side_by_side(make, range(count))


def _least_facts(task: CodeTask) -> int:
    return QUERIES if task == "code_multiquery" else 1


def _event(word: str) -> str:
    """The repeated line of code_frequent."""
    return f'last_event = "{word.lower()}"\n'


def _extra_tokens(task: str, tokenizer: Tokenizer, seed: int) -> int:
    """What the answers before the last one take in a question of several answers."""
    if task != "code_multiquery":
        return 0
    asked = plain_facts("constant", QUERIES, seed)
    text = "".join(f"{question.text}{question.answer}\n" for _, question in asked)
    return 2 * len(continued_ids(tokenizer, text))  # names differ in length


def _value_by_value(document: FactDocument) -> FactDocument:
    """Each value of a list asked after the values before it."""
    questions: list[Question] = []
    for question in document.questions:
        values = question.answer.removesuffix("]").split(", ")
        assert len(values) == LIST_VALUES
        for i, value in enumerate(values):
            questions.append(Question(question.text + "".join(f"{v}, " for v in values[:i]), value))
    return FactDocument(document.text, tuple(questions))


def _in_one_go(document: FactDocument) -> FactDocument:
    """The first four facts asked in a row, each after the answers before it."""
    before = ""
    questions: list[Question] = []
    for question in document.questions[:QUERIES]:
        questions.append(Question(before + question.text, question.answer))
        before += f"{question.text}{question.answer}\n"
    return FactDocument(document.text, tuple(questions))


def _frequent_document(
    ids: Sequence[int], tokenizer: Tokenizer, others: int, room: int, seed: int
) -> FactDocument:
    """A repeated line that ends with one word 12 times and with each of the others twice."""
    rng = random.Random(seed)
    common, *rest = (word.lower() for word in rng.sample(FIRST_WORDS, others + 1))
    words = [common] * FREQUENT_LINES + rest * OTHER_LINES
    rng.shuffle(words)
    question = Question('last_event = "', common)
    lines = sorted((rng.random(), _event(word)) for word in words)
    tail = len(continued_ids(tokenizer, question.text + question.answer))
    return FactDocument(_plant(ids, tokenizer, lines, room - tail), (question,))


def _plant(
    ids: Sequence[int], tokenizer: Tokenizer, planted: Sequence[tuple[float, str]], room: int
) -> str:
    """Source text of at most `room` tokens with lines at their depths, ascending.

    Raises:
        ConversionError: the planted lines leave no room for text.
    """
    kept = room - len(continued_ids(tokenizer, "".join(line for _, line in planted)))
    while kept > 0:
        lines = tokenizer.decode(list(ids[:kept])).splitlines(keepends=True)[:-1]
        parts: list[str] = []
        start = 0
        for depth, line in planted:
            stop = round(depth * len(lines))
            parts += [*lines[start:stop], line]
            start = stop
        text = "".join([*parts, *lines[start:]])
        excess = len(continued_ids(tokenizer, text)) - room
        if excess <= 0 and lines:
            return text
        kept -= max(excess, 1)
    raise ConversionError("code: the length is too short for the planted lines")
