"""Planted facts: where they stand, what is asked, and how long a prompt becomes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from conversion.code_facts import FACT_KINDS, FactKind, fact_documents
from conversion.errors import ConversionError
from conversion.text_source import TextSource, load_tokenizer
from engine.embedded import embedded_model_path

TOKENS = 1500


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(embedded_model_path())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    folder = tmp_path_factory.mktemp("code")
    for number in range(6):
        lines = (f"def area_{number}_{i}(x):\n    return x * {i}\n\n" for i in range(60))
        (folder / f"{number}.py").write_text("".join(lines))
    return TextSource.find(folder)


@pytest.mark.parametrize("kind", FACT_KINDS)
def test_every_question_is_answered_by_one_planted_line(
    kind: FactKind, tokenizer: Tokenizer, source: TextSource
) -> None:
    documents = fact_documents(source, tokenizer, kind=kind, count=3, facts=8, tokens=TOKENS)
    for document in documents:
        assert len(document.questions) == 8
        lines = document.text.splitlines()
        for question in document.questions:
            key = re.fullmatch(r"assert (.*) == \[?", question.text)
            assert key is not None
            if kind == "list":
                values = question.answer.removesuffix("]").split(", ")
                planted = [line for line in lines if line.startswith(f"{key[1]}.append(")]
                assert planted == [f"{key[1]}.append({value})" for value in values]
                continue
            value = question.answer
            assert re.fullmatch(r"\d{5}", value)
            if kind == "chain":
                (place,) = [i for i, line in enumerate(lines) if line.startswith(f"{key[1]} = ")]
                origin = lines[place].removeprefix(f"{key[1]} = ")
                assert f"{origin} = {value}" in lines[:place], "the value comes before its alias"
            else:
                assert lines.count(f"{key[1]} = {value}") == 1
            assert document.text.count(value) == 1


@pytest.mark.parametrize("kind", FACT_KINDS)
def test_prompts_fill_the_length_that_was_asked_for(
    kind: FactKind, tokenizer: Tokenizer, source: TextSource
) -> None:
    for document in fact_documents(source, tokenizer, kind=kind, count=3, facts=8, tokens=TOKENS):
        for question in document.questions:
            ids = tokenizer.encode(document.text + question.text + question.answer).ids
            assert TOKENS - 40 <= len(ids) <= TOKENS


def test_facts_are_spread_over_the_document(tokenizer: Tokenizer, source: TextSource) -> None:
    (document,) = fact_documents(
        source, tokenizer, kind="constant", count=1, facts=16, tokens=TOKENS
    )
    depths = [document.text.index(q.answer) / len(document.text) for q in document.questions]
    assert min(depths) < 0.25
    assert max(depths) > 0.75


def test_a_seed_fixes_everything(tokenizer: Tokenizer, source: TextSource) -> None:
    def make(seed: int) -> object:
        return fact_documents(
            source, tokenizer, kind="constant", count=1, facts=4, tokens=TOKENS, seed=seed
        )

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_too_little_text_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text("x = 1\n" * 100)
    with pytest.raises(ConversionError, match="too little text"):
        fact_documents(
            TextSource.find(tmp_path), tokenizer, kind="constant", count=1, facts=4, tokens=TOKENS
        )


def test_one_long_file_makes_several_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("".join(f"line {i} of {i * i}\n" for i in range(2000)))
    first, second = TextSource.find(file).documents(tokenizer, 2, 500, seed=0)
    assert len(first) == len(second) == 500
    assert (
        tokenizer.decode(first + second)
        == file.read_text()[: len(tokenizer.decode(first + second))]
    )
