"""Sequences for stage 2: their lengths, their planted facts, and rows that are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from conversion.distil_data import JsonlRows, Sample, text_samples
from conversion.errors import ConversionError
from conversion.text_source import TextSource
from tests.engine.byte_tokenizer import byte_tokenizer

TOKENS, RESPONSE = 2048, 200


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer(320)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        lines = (f"def f{i}_{j}(x):\n    return x * {i * j} + {j}\n" for j in range(60))
        (folder / f"{i:02}.py").write_text("".join(lines))
    return TextSource.find(folder)


def samples(source: TextSource, tokenizer: Tokenizer, share: float, seed: int = 0) -> list[Sample]:
    return list(
        text_samples(
            source, tokenizer, tokens=TOKENS, response=RESPONSE, facts_share=share, seed=seed
        )
    )


def test_questions_are_answered_by_facts_far_before_them(
    source: TextSource, tokenizer: Tokenizer
) -> None:
    found = samples(source, tokenizer, 1.0)

    assert len(found) > 15
    for sample in found:
        assert len(sample.ids) == TOKENS
        assert sample.response == RESPONSE
        text = tokenizer.decode(sample.ids)
        asked = re.findall(r"^assert (\S+) == (\d{5}|\[.*\])$", text, flags=re.MULTILINE)
        assert len(asked) == 2  # as many as were planted: there was room for every one
        assert text.endswith(f"== {asked[-1][1]}\n")
        before = text[: text.index(f"assert {asked[0][0]} ==")]
        for _, answer in asked:
            values = re.findall(r"\d{5}", answer)
            assert values
            assert all(value in before for value in values)


def test_the_share_of_facts_is_kept_to(source: TextSource, tokenizer: Tokenizer) -> None:
    plain = samples(source, tokenizer, 0.0)
    assert [s.ids for s in plain] == list(source.stream(tokenizer, TOKENS, 0))
    mixed = samples(source, tokenizer, 0.5)
    changed = [a.ids != b.ids for a, b in zip(plain, mixed, strict=True)]
    assert 0 < sum(changed) < len(changed)


def test_the_seed_alone_decides(source: TextSource, tokenizer: Tokenizer) -> None:
    assert samples(source, tokenizer, 0.5, 3) == samples(source, tokenizer, 0.5, 3)
    assert samples(source, tokenizer, 0.5, 3) != samples(source, tokenizer, 0.5, 4)


def rows(path: Path, *lines: object) -> JsonlRows:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return JsonlRows.open(path)


def test_rows_become_sequences(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = rows(
        tmp_path / "data.jsonl",
        {"prompt": "what is é? ", "response": "a letter"},
        "",
        {"text": "x" * 10 + "y" * 40},
        {"prompt": "p" * 60, "response": "r" * 30},
    ).samples(tokenizer, tokens=50, response=20, seed=0)

    by_text = {tokenizer.decode(sample.ids): sample.response for sample in found}

    assert by_text == {
        "what is é? a letter": 8,
        "x" * 10 + "y" * 40: 20,
        "p" * 20 + "r" * 30: 20,  # the prompt lost its beginning
    }


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"text": "', "line 2: not JSON"),
        ("[1]", 'line 2: needs "prompt" and "response", or "text"'),
        ({"prompt": "a"}, "line 2: needs"),
        ({"prompt": "a", "response": ""}, "line 2: needs"),
        ({"text": 7}, "line 2: needs"),
        ("\udcff", "line 2: not JSON"),
    ],
    ids=["broken", "a-list", "no-response", "empty-response", "a-number", "not-utf8"],
)
def test_a_bad_row_is_named(tmp_path: Path, bad: object, words: str) -> None:
    path = tmp_path / "data.jsonl"
    text = bad if isinstance(bad, str) else json.dumps(bad)
    path.write_bytes(b'{"text": "good"}\n' + text.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(ConversionError, match=re.escape(words)) as caught:
        JsonlRows.open(path)
    assert "\n" not in str(caught.value)


def test_a_row_without_room_for_a_prompt_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = rows(tmp_path / "data.jsonl", {"text": "x" * 20})
    with pytest.raises(ConversionError, match=r"data.jsonl line 1: too short, its 20 tokens"):
        list(found.samples(tokenizer, tokens=50, response=20, seed=0))


def test_a_file_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="not readable"):
        JsonlRows.open(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ConversionError, match="no row"):
        JsonlRows.open(tmp_path / "empty.jsonl")
