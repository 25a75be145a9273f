"""Facts asked for at the end of a text: where their answers stand, and what does not fit."""

from __future__ import annotations

import pytest

from conversion.asked_facts import LONGEST_LINE, ROOM_SHARE, SAFETY, asked_facts
from conversion.text_source import load_tokenizer
from engine.embedded import embedded_model_path
from tests.engine.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer(320)
TEXT = TOKENIZER.encode("".join(f"line_{i} = {i}\n" for i in range(400))).ids
LEAST = int(2 * SAFETY * len(TOKENIZER.encode(LONGEST_LINE).ids) / ROOM_SHARE)  # for two facts


@pytest.mark.parametrize("seed", range(8))
def test_answers_stand_where_they_are_said_to(seed: int) -> None:
    found = asked_facts(TEXT, TOKENIZER, seed)
    assert found is not None
    assert len(found.ids) <= len(TEXT)
    text = TOKENIZER.decode(found.ids)
    lines = text.splitlines()[-len(found.answers) :]
    for line, answer in zip(lines, found.answers, strict=True):
        assert line.startswith("assert ")
        values = TOKENIZER.decode([found.ids[place] for place in answer])
        assert line.endswith(values)
        assert values.strip("]").replace(", ", "").isdigit()
        question = line[: -len(values)]
        assert question + values not in text[: text.index(line)], "asked once"
    assert text.endswith("\n")


def test_a_text_without_room_for_two_facts_is_left_alone() -> None:
    assert asked_facts(TEXT[: LEAST - 8], TOKENIZER, 0) is None
    found = asked_facts(TEXT[: LEAST + 8], TOKENIZER, 0)
    assert found is not None
    assert len(found.answers) == 2


def test_the_seed_alone_decides() -> None:
    assert asked_facts(TEXT, TOKENIZER, 3) == asked_facts(TEXT, TOKENIZER, 3)
    assert asked_facts(TEXT, TOKENIZER, 3) != asked_facts(TEXT, TOKENIZER, 4)


def test_the_first_question_is_tokenised_with_the_text_before_it() -> None:
    """Empty lines at its end may be one token where they are two before a question."""
    tokenizer = load_tokenizer(embedded_model_path())
    source = tokenizer.encode("".join(f"def f_{i}():\n    pass\n\n\n" for i in range(900))).ids
    found = [asked_facts(source, tokenizer, seed) for seed in range(6)]
    for asked in found:
        assert asked is not None
        first = asked.ids[: asked.answers[0].start]
        assert first == tokenizer.encode(tokenizer.decode(first)).ids
