"""Planted documents, and the positions that are looked at in them."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest

from conversion.attention_samples import planted_document, question_rows, row_kinds, sample_rows
from conversion.calibration import NEEDLE_TOKENS
from conversion.document_feed import DocumentFeed
from conversion.errors import ConversionError
from conversion.text_source import TextSource
from tests.engine.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer(320)
TEXT = TOKENIZER.encode("".join(f"line_{i} = {i}\n" for i in range(400))).ids


@pytest.mark.parametrize("seed", range(0, 12, 2))
def test_positions_of_answers_are_followed_by_planted_values(seed: int) -> None:
    document = planted_document(TEXT, TOKENIZER, seed)
    assert len(document.ids) <= len(TEXT)
    assert document.answers == sorted(set(document.answers))
    answer = TOKENIZER.decode([document.ids[row + 1] for row in document.answers])
    values = re.findall(r"\d{5}", answer)
    assert len(values) >= 2
    body = TOKENIZER.decode(document.ids[: document.answers[0]])
    for value in values:
        assert value in body, "an answer must stand far before its question"


def test_positions_of_a_needle_are_followed_by_the_needle() -> None:
    document = planted_document(TEXT, TOKENIZER, 1)
    assert len(document.ids) == len(TEXT)
    early = document.ids[16 : 16 + NEEDLE_TOKENS]
    assert [document.ids[row + 1] for row in document.answers] == early[1:]


def test_a_short_document_holds_a_needle_at_least() -> None:
    document = planted_document(TEXT[:300], TOKENIZER, 0)
    assert len(document.answers) == NEEDLE_TOKENS - 1
    with pytest.raises(ConversionError, match="too short"):
        planted_document(TEXT[:100], TOKENIZER, 0)


def test_a_quarter_of_the_sampled_queries_are_at_answers() -> None:
    document = planted_document(TEXT, TOKENIZER, 1)
    rows = sample_rows(document, 64, 5).tolist()
    assert rows == sorted(set(rows))
    assert len(set(rows) & set(document.answers)) == 16
    assert len(rows) == 64
    assert min(rows) >= len(document.ids) // 4
    assert sample_rows(document, 64, 6).tolist() != rows
    anywhere, answers = row_kinds(document, 200, 5)
    assert answers.tolist() == document.answers  # there are fewer
    assert len(anywhere) == 200
    assert int(anywhere.max()) < document.answers[0]


def test_an_eighth_of_the_sampled_queries_are_of_questions() -> None:
    document = planted_document(TEXT, TOKENIZER, 0)
    first, last = document.answers[0], document.answers[-1]
    between = set(range(first, last)) - set(document.answers)
    assert set(document.questions) == between
    rows = set(sample_rows(document, 64, 5).tolist())
    assert len(rows) == 64
    assert len(rows & between) == 8
    assert len(rows & set(document.answers)) == 16
    asked = question_rows(document, 10, 5).tolist()
    assert len(set(asked)) == 10
    assert set(asked) <= between
    assert asked == sorted(asked)


def test_a_needle_asks_nothing() -> None:
    document = planted_document(TEXT, TOKENIZER, 1)
    assert document.questions == []
    assert question_rows(document, 10, 5).tolist() == []


def make_feed(folder: Path, held_out: int) -> DocumentFeed:
    text = folder / "text.txt"
    text.write_text("".join(f"value_{i} = {i * i}\n" for i in range(200)))
    return DocumentFeed(TextSource.find(text), TOKENIZER, 400, 3, held_out)


def test_training_never_reads_what_is_held_out_and_has_no_end(tmp_path: Path) -> None:
    feed = make_feed(tmp_path, held_out=2)
    middles = [tuple(document.ids[80:300]) for document in feed.held_out()]
    train = [tuple(document.ids[80:300]) for document in islice(feed.training(0), 20)]
    assert len(middles) == 2
    assert not set(middles) & set(train)
    assert len(set(train)) < 20, "the text is shorter than that"


def test_a_resumed_feed_and_shared_feeds_give_the_same_documents(tmp_path: Path) -> None:
    feed = make_feed(tmp_path, held_out=2)
    whole = list(islice(feed.training(0), 20))
    assert list(islice(feed.training(7), 13)) == whole[7:]
    assert list(islice(feed.training(1, stride=2), 10)) == whole[1::2]
    assert len({tuple(document.ids) for document in whole}) == 20, "planted anew every time"


def test_text_that_is_all_held_out_is_refused(tmp_path: Path) -> None:
    source = TextSource.find(make_feed(tmp_path, 1)._source.files[0])
    count = len(list(source.stream(TOKENIZER, 400, 3)))
    with pytest.raises(ConversionError, match="none is left to train on"):
        next(make_feed(tmp_path, count).training(0))
    with pytest.raises(ConversionError, match="too little text"):
        make_feed(tmp_path, count + 1).held_out()
