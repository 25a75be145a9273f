"""From names of tasks to samples; texts and word lists are read when a task first needs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from tokenizers import Tokenizer

from conversion.errors import ConversionError
from conversion.evaluation.code_tasks import (
    CODE_TASKS,
    CodeTask,
    code_documents,
    code_passkey_documents,
    has_room,
)
from conversion.evaluation.haystack import Haystack
from conversion.evaluation.kept_source import KeptSource
from conversion.evaluation.key_value import key_value_sample
from conversion.evaluation.options import EvalOptions
from conversion.evaluation.passkey import passkey_sample
from conversion.evaluation.ruler.niah import NIAH_RULES
from conversion.evaluation.ruler.tasks import ruler_samples
from conversion.evaluation.samples import Sample, TokenCounter
from conversion.evaluation.traces import Trace, TraceTask, make_trace
from conversion.evaluation.words import Words
from conversion.text_source import TextSource

NEEDS_PROSE = frozenset(name for name, rule in NIAH_RULES.items() if rule.haystack == "essay")
NEEDS_WORDS = frozenset(
    [name for name, rule in NIAH_RULES.items() if rule.key_kind == "words"] + ["cwe"]
)
READS_DATA = frozenset({*CODE_TASKS, "code_passkey", "text"})


class SampleMaker:
    """Makes the samples of an evaluation; the same options give the same samples."""

    def __init__(self, tokenizer: Tokenizer, options: EvalOptions, *, keep: bool = False) -> None:
        """`keep`: remember the samples of `cells`, for an evaluation that asks more than once."""
        self._kept: dict[tuple[str, int], list[tuple[Mapping[str, str], list[Sample]]]] = {}
        self._keep = keep
        self._tokenizer = tokenizer
        self._options = options
        self._count_tokens = TokenCounter(tokenizer)

    def prepare(self) -> tuple[str, ...]:
        """Read what the selected tasks need; what to tell people about it.

        Raises:
            ConversionError: a text or the word lists are missing.
        """
        selected = frozenset(self._options.selected())
        notes = []
        if selected & NEEDS_PROSE:
            notes.append(f"haystack: {self._haystack.description}")
        if selected & NEEDS_WORDS:
            notes.append(f"words: {len(self._words.nouns)} nouns and more of wonderwords")
        if selected & READS_DATA:
            notes.append(f"code and text: {self._source.description}")
        return (*notes, *self._left_out())

    def settings(self, task: str, length: int) -> int:
        """How many settings a task has at a length."""
        if task in CODE_TASKS:
            return len(self._facts(task, length))
        return len(self._options.depths) if task in ("passkey", "code_passkey") else 1

    def _left_out(self) -> tuple[str, ...]:
        """Settings of the selected tasks that are not measured, in words."""
        return tuple(
            f"{task} at {length}: no room for {facts} facts, left out"
            for length in self._options.lengths
            for task in self._options.selected()
            if task in CODE_TASKS
            for facts in self._options.facts
            if not has_room(task, self._tokenizer, facts, length)
        )

    def cells(self, task: str, length: int) -> Iterator[tuple[Mapping[str, str], list[Sample]]]:
        """Settings of a task that is scored by answers, with their samples.

        Raises:
            ConversionError: too little text, or the length is too short.
        """
        if not self._keep:
            yield from self._made(task, length)
            return
        if (task, length) not in self._kept:
            self._kept[task, length] = list(self._made(task, length))
        yield from self._kept[task, length]

    def _made(self, task: str, length: int) -> Iterator[tuple[Mapping[str, str], list[Sample]]]:
        count, seed = self._options.samples, self._options.seed
        if task in CODE_TASKS:
            for facts in self._facts(task, length):
                documents = code_documents(
                    task,
                    self._source,
                    self._tokenizer,
                    count=count,
                    facts=facts,
                    length=length,
                    seed=seed,
                )
                yield {"facts": str(facts)}, [*documents]
        elif task in ("passkey", "code_passkey"):
            for depth in self._options.depths:
                yield {"depth": f"{depth:g}"}, self._passkeys(task, length, depth)
        elif task == "kv":
            numbers = range(seed * count, (seed + 1) * count)
            yield {}, [key_value_sample(length, n, self._count_tokens) for n in numbers]
        else:
            words = self._words if task in NEEDS_WORDS else Words((), (), ())
            haystack = self._haystack if task in NEEDS_PROSE else Haystack((), "")
            yield (
                {},
                [*ruler_samples(task, count, length, self._count_tokens, words, haystack)],
            )

    def traces(self, task: TraceTask, length: int) -> list[Trace]:
        """
        Raises:
            ConversionError: the length is too short.
        """
        first = self._options.seed * self._options.samples
        return [
            make_trace(task, self._tokenizer, length, first + number)
            for number in range(self._options.samples)
        ]

    def texts(self, length: int) -> list[list[int]]:
        """Documents of plain text, exactly `length` tokens each.

        Raises:
            ConversionError: too little text.
        """
        options = self._options
        return self._source.documents(self._tokenizer, options.text_samples, length, options.seed)

    def _facts(self, task: CodeTask, length: int) -> list[int]:
        """Numbers of facts for which there is room; one at least."""
        facts = self._options.facts
        fitting = [n for n in facts if has_room(task, self._tokenizer, n, length)]
        if not fitting:
            raise ConversionError(f"{task}: length {length} is too short for {min(facts)} facts")
        return fitting

    def _passkeys(self, task: str, length: int, depth: float) -> list[Sample]:
        count, seed = self._options.samples, self._options.seed
        if task == "passkey":
            numbers = range(seed * count, (seed + 1) * count)
            return [passkey_sample(length, depth, n, self._count_tokens) for n in numbers]
        return [
            *code_passkey_documents(
                self._source, self._tokenizer, count=count, depth=depth, length=length, seed=seed
            )
        ]

    @cached_property
    def _words(self) -> Words:
        return Words.load()

    @cached_property
    def _haystack(self) -> Haystack:
        return Haystack.find(self._options.haystack)

    @cached_property
    def _source(self) -> TextSource:
        return KeptSource.of(TextSource.find(self._options.data))
