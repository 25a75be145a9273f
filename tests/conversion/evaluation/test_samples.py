"""Passkeys, key-value pairs, code documents and traces: lengths, places, answers, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from conversion.code_facts import FactDocument
from conversion.errors import ConversionError
from conversion.evaluation.code_tasks import (
    CODE_TASKS,
    CodeTask,
    code_documents,
    code_passkey_documents,
    has_room,
)
from conversion.evaluation.haystack import Haystack, sentences
from conversion.evaluation.kept_source import KeptSource
from conversion.evaluation.key_value import key_value_sample
from conversion.evaluation.passkey import passkey_sample
from conversion.evaluation.ruler.niah import NOISE
from conversion.evaluation.samples import TokenCounter
from conversion.evaluation.traces import TRACE_TASKS, TraceTask, make_trace
from conversion.text_source import TextSource
from tests.engine.byte_tokenizer import byte_tokenizer

LENGTH = 4000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer(320)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    folder = tmp_path_factory.mktemp("source")
    for number in range(4):
        lines = (f"def function_{number}_{i}(x):\n    return x + {i}\n\n" for i in range(200))
        (folder / f"module_{number}.py").write_text("".join(lines))
    return TextSource.find(folder)


def tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text).ids)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_passkey_stands_at_its_depth(tokenizer: Tokenizer, depth: float) -> None:
    sample = passkey_sample(LENGTH, depth, 3, TokenCounter(tokenizer))
    total = tokens(tokenizer, sample.prompt) + sample.generated_tokens
    assert LENGTH - len(NOISE) - 2 <= total <= LENGTH
    before, after = sample.prompt.split(f"The pass key is {sample.references[0]}. Remember it.")
    assert sample.prompt.endswith("What is the pass key? The pass key is")
    noise = before.count(NOISE) + after.count(NOISE)
    assert before.count(NOISE) == pytest.approx(depth * noise, abs=0.5)


def test_passkeys_differ_between_samples_and_not_between_depths(tokenizer: Tokenizer) -> None:
    count = TokenCounter(tokenizer)
    keys = {passkey_sample(LENGTH, 0.5, number, count).references for number in range(20)}
    assert len(keys) > 15
    assert passkey_sample(LENGTH, 0.1, 7, count).references == (
        passkey_sample(LENGTH, 0.9, 7, count).references
    )


def test_key_value_pairs_are_json_that_holds_the_answer(tokenizer: Tokenizer) -> None:
    places = []
    for number in range(12):
        sample = key_value_sample(LENGTH, number, TokenCounter(tokenizer))
        total = tokens(tokenizer, sample.prompt) + sample.generated_tokens
        assert LENGTH - 2 * 83 < total <= LENGTH
        data = json.loads(sample.prompt.split("JSON data:\n")[1].split("\n\nKey:")[0])
        asked = re.search(r'\nKey: "(.*)"\nCorresponding value:$', sample.prompt)
        assert asked is not None
        assert sample.references == (data[asked[1]],)
        places.append(list(data).index(asked[1]) / len(data))
    assert min(places) < 0.3
    assert max(places) > 0.7


@pytest.mark.parametrize("facts", [1, 4, 16])
@pytest.mark.parametrize("task", CODE_TASKS)
def test_code_documents_fit_and_answer_their_questions(
    task: CodeTask, facts: int, source: TextSource, tokenizer: Tokenizer
) -> None:
    documents = code_documents(task, source, tokenizer, count=3, facts=facts, length=LENGTH, seed=1)
    assert len({document.text for document in documents}) == 3
    for document in documents:
        for question in document.questions:
            total = tokens(tokenizer, document.text + question.text + question.answer)
            assert total <= LENGTH
            assert answered(task, document, question.text) == question.answer
        assert tokens(tokenizer, document.text) > 0.75 * LENGTH
        assert len(document.questions) == {
            "code_multivalue": 3 * facts,
            "code_multiquery": 4,
            "code_frequent": 1,
        }.get(task, facts)


def answered(task: CodeTask, document: FactDocument, question: str) -> str:
    """The answer, by reading the planted lines as a person would."""
    if task == "code_frequent":
        events = re.findall(r'^last_event = "(\w+)"$', document.text, re.MULTILINE)
        return str(max(events, key=events.count))
    asked = question.splitlines()[-1].removeprefix("assert ")
    name = asked.split(" == ")[0]
    if task in ("code_list", "code_multivalue"):
        pattern = rf"^{name}\.append\((\d+)\)$"
        values = re.findall(pattern, document.text, re.MULTILINE)
        given = asked.split("[")[1].count(",")
        return ", ".join(values) + "]" if task == "code_list" else str(values[given])
    value = re.findall(rf"^{re.escape(name)} = (\w+)$", document.text, re.MULTILINE)
    assert len(value) == 1
    if value[0].isdigit():
        return str(value[0])
    return str(re.findall(rf"^{value[0]} = (\d+)$", document.text, re.MULTILINE)[0])


def test_questions_in_one_go_come_after_the_answers_before_them(
    source: TextSource, tokenizer: Tokenizer
) -> None:
    (document,) = code_documents(
        "code_multiquery", source, tokenizer, count=1, facts=1, length=LENGTH, seed=0
    )
    first, second, *_ = document.questions
    assert second.text.startswith(f"{first.text}{first.answer}\n")
    assert document.questions[3].text.count("\n") == 3


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_constant_stands_at_its_depth(
    source: TextSource, tokenizer: Tokenizer, depth: float
) -> None:
    documents = code_passkey_documents(
        source, tokenizer, count=2, depth=depth, length=LENGTH, seed=0
    )
    for document in documents:
        lines = document.text.splitlines()
        (question,) = document.questions
        (place,) = [i for i, line in enumerate(lines) if line.endswith(f"= {question.answer}")]
        assert place == pytest.approx(depth * (len(lines) - 1), abs=1)
        assert tokens(tokenizer, document.text + question.text + question.answer) <= LENGTH


def test_too_many_facts_for_the_length_are_refused(
    source: TextSource, tokenizer: Tokenizer
) -> None:
    assert not has_room("code_list", tokenizer, 16, 1000)
    with pytest.raises(ConversionError, match="too short for 16 facts"):
        code_documents("code_list", source, tokenizer, count=1, facts=16, length=1000, seed=0)


@pytest.mark.parametrize("length", [300, 40])
def test_prompts_that_cannot_be_made_are_refused(tokenizer: Tokenizer, length: int) -> None:
    count = TokenCounter(tokenizer)
    with pytest.raises(ConversionError, match="passkey: the length is too short"):
        passkey_sample(length, 0.5, 0, count)
    with pytest.raises(ConversionError, match="kv: the length is too short"):
        key_value_sample(length // 3, 0, count)
    with pytest.raises(ConversionError, match="the length is too short"):
        make_trace("trace_state", tokenizer, length, 0)


@pytest.mark.parametrize("task", TRACE_TASKS)
def test_a_trace_states_what_its_program_computes(task: TraceTask, tokenizer: Tokenizer) -> None:
    """The trace is Python: its assertions hold when it runs, and the steps point at the values."""
    trace = make_trace(task, tokenizer, LENGTH, seed=2)
    ids = [*trace.prompt, *trace.generated]
    text = tokenizer.decode(ids)
    assert LENGTH - 80 < len(ids) <= LENGTH
    exec(compile(text, "trace", "exec"), {})
    values = [tokenizer.decode(ids[step.start : step.stop]) for step in trace.steps]
    stated = re.findall(r"assert \w+ == (\d+)", tokenizer.decode(list(trace.generated)))
    assert values == stated
    assert len(values) > 15
    assert trace.steps[0].start >= len(trace.prompt)
    assert tokenizer.decode(list(trace.prompt)).count("assert") == 8


def test_distances_of_a_trace_go_from_one_line_to_most_of_it(tokenizer: Tokenizer) -> None:
    trace = make_trace("trace_state", tokenizer, 20_000, seed=0)
    distances = [step.distance for step in trace.steps]
    assert min(distances) < 60
    assert max(distances) > 8000
    ids = [*trace.prompt, *trace.generated]
    for step in trace.steps:
        value = tokenizer.decode(ids[step.start : step.stop])
        before = tokenizer.decode(ids[: step.start - step.distance])
        assert before.endswith(f" = {value}\n")


def test_prose_comes_from_a_folder_and_repeats(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("Second sentence here. " * 300)
    (tmp_path / "a.md").write_text('"First one!" he said. ' * 300)
    (tmp_path / "c.bin").write_bytes(b"\x00" * 5000)
    haystack = Haystack.find(tmp_path)
    assert haystack.words[:2] == ('"First', 'one!"')
    assert len(haystack.words) == 4 * 300 + 3 * 300
    assert str(tmp_path) in haystack.description
    assert "instead of" in haystack.description
    assert haystack.text(2102).split()[-2:] == ['"First', 'one!"']


def test_sentences_end_at_stops_only() -> None:
    text = 'It is 3.5 m. "Really?" he asked. No (it is not.) Yes! e.g. this'
    assert sentences(text) == [
        "It is 3.5 m.",
        '"Really?" he asked.',
        "No (it is not.)",
        "Yes! e.g. this",
    ]


def test_a_haystack_without_prose_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no such file or folder"):
        Haystack.find(tmp_path / "none")
    with pytest.raises(ConversionError, match="0 words of prose"):
        Haystack.find(tmp_path)


def test_files_are_encoded_once_and_documents_stay_the_same(tmp_path: Path) -> None:
    class Counting:
        """A tokenizer of characters that counts how often it is asked."""

        asked = 0

        def encode(self, text: str, add_special_tokens: bool) -> Any:
            self.asked += 1
            return SimpleNamespace(ids=[ord(character) for character in text])

    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"line {number}\n" * 100)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe" * 1000)
    source, tokenizer = TextSource.find(tmp_path), Counting()
    kept = KeptSource.of(source)
    for tokens, seed in ((500, 0), (700, 0), (500, 1)):
        found = kept.documents(tokenizer, 4, tokens, seed)  # type: ignore[arg-type]
        assert found == source.documents(Counting(), 4, tokens, seed)  # type: ignore[arg-type]
        assert all(type(token) is int for token in found[0])
    assert tokenizer.asked == 4
