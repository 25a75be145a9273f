"""Measurements through the serving path against slow generation without a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from conversion.code_facts import FactDocument, Question
from conversion.evaluation.teacher_forced import EncodedFacts, FactResult, answer_facts, decode_loss
from conversion.text_source import load_tokenizer
from engine.embedded import embedded_model_path
from tests.conversion.evaluation.word_model import (
    GREEDY,
    MODEL,
    greedy_after,
    prompt,
    variant,
    word_tokenizer,
    words,
)
from tests.engine.oracle import Answer, Oracle
from tests.engine.tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), MODEL)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_the_decode_loss_is_that_of_the_whole_matrix(folder: Path, dense: bool) -> None:
    ids, decoded = prompt(150, 1), 30
    answer = Answer()
    Oracle(folder, MODEL, dense=dense)._forward(ids, len(ids) - decoded - 1, GREEDY, answer)
    expected = cross_entropy(answer.logits[-decoded - 1 : -1], torch.tensor(ids[-decoded:]))

    found = decode_loss(variant(folder, dense=dense), [ids, ids], decoded, chunk_rows=7)

    assert found.tokens == 2 * decoded
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)
    if dense:
        assert found.attended_fraction is None
    else:
        # The last token is decoded by the oracle, for what comes after it, and not here.
        before = Answer()
        start = len(ids) - decoded - 1
        Oracle(folder, MODEL)._forward(ids[:-1], start, GREEDY, before)
        assert found.attended_fraction == pytest.approx(before.fraction / before.pairs, rel=1e-6)
        assert before.blocks_dropped > 50


def test_an_answer_is_right_exactly_if_greedy_decoding_gives_it(folder: Path) -> None:
    text, question = prompt(120, 2), prompt(6, 3)
    greedy = greedy_after(folder, text + question, len(text), 4)
    right = words(greedy)
    wrong = words([*greedy[:-1], (greedy[-1] + 1) % MODEL.vocab])
    texts = [words(text), words(question)]
    questions = tuple(Question(texts[1], answer) for answer in (right, wrong, right))

    result = answer_facts(variant(folder), word_tokenizer(), [FactDocument(texts[0], questions)])

    assert (result.asked, result.right) == (3, 2)
    assert result.attended_fraction is not None
    assert 0 < result.attended_fraction < 1


def test_accuracy_is_the_share_of_right_answers() -> None:
    assert FactResult(asked=8, right=6, attended_fraction=None).accuracy == 0.75


@pytest.mark.parametrize("end", ["x = 1\n", "x = 1\n\n", "x = 1\n\n\n", "x"])
def test_a_document_and_its_questions_are_tokenised_as_one_text(end: str) -> None:
    """Two line breaks are one token at an end, and two before a name: which the model knows."""
    tokenizer = load_tokenizer(embedded_model_path())
    asked = tuple(Question(f"assert {name} == ", "12345") for name in ("IRON", "WILLOW", "HARBOR"))
    encoded = EncodedFacts.encode(tokenizer, FactDocument("def f():\n" + end, asked))
    for (question, answer), given in zip(encoded.questions, asked, strict=True):
        whole = tokenizer.encode("def f():\n" + end + given.text).ids
        assert encoded.text + question == whole
        assert tokenizer.decode(answer) == given.answer
    document = "def f():\n" + end
    assert tokenizer.decode(encoded.text) in (document, document.rstrip("\n"))


def test_an_only_question_is_not_part_of_the_document() -> None:
    tokenizer = load_tokenizer(embedded_model_path())
    document = FactDocument("x = 1\n", (Question("assert x == ", "1"),))
    encoded = EncodedFacts.encode(tokenizer, document)
    assert tokenizer.decode(encoded.text) == "x = 1\n"
    assert tokenizer.decode(encoded.questions[0][0]) == "assert x == "
