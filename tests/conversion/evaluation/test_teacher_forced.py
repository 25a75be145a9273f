"""Measurements through the serving path against slow generation without a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from conversion.code_facts import FactDocument, Question
from conversion.evaluation.teacher_forced import FactResult, answer_facts, decode_loss
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
