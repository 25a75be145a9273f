"""Long generated state tracking: a program's trace, written by rule, that a model goes on writing.

    trace_state     values are assigned; half of them are read back once, sooner or much later
    trace_counters  counters grow by 1 to 9 and are stated after every change

Every value read is a step with one right answer, judged teacher-forced under the decode rule. What
a model needs was generated, not prompted, so this shows what the window forgets of generated text.
Torch-free.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tokenizers import Tokenizer

from conversion.code_facts import FIRST_WORDS, SECOND_WORDS
from conversion.errors import ConversionError
from conversion.evaluation.samples import continued_ids, prompt_ids

TraceTask = Literal["trace_state", "trace_counters"]
TRACE_TASKS: tuple[TraceTask, ...] = get_args(TraceTask)
COUNTERS = 8
PROMPT_STEPS = 8  # solved steps, so that the form of the trace is known


@dataclass(frozen=True, slots=True)
class Step:
    """One read value: the answer's tokens are trace tokens [start, stop)."""

    start: int
    stop: int
    distance: int  # tokens since the value, or the counter's last value, was written


@dataclass(frozen=True, slots=True)
class Trace:
    """A prompt and its continuation by rule. Steps are in the continuation only."""

    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    steps: tuple[Step, ...]  # offsets in prompt + generated


@dataclass(frozen=True, slots=True)
class _Event:
    """A line of the program: text, and for a read its answer and the variable."""

    text: str
    variable: int
    answer: str | None = None  # stands between text and the line break


def make_trace(task: TraceTask, tokenizer: Tokenizer, length: int, seed: int) -> Trace:
    """A trace of at most `length` tokens.

    Raises:
        ConversionError: the length is too short for a step after the prompt.
    """
    events = _counter_events(seed) if task == "trace_counters" else _state_events(seed)
    ids = list(prompt_ids(tokenizer, ""))
    written: dict[int, int] = {}
    steps: list[Step] = []
    prompt = 0
    for event in events:
        text = continued_ids(tokenizer, event.text)
        answer = continued_ids(tokenizer, event.answer or "")
        end = continued_ids(tokenizer, "\n")
        if len(ids) + len(text) + len(answer) + len(end) > length:
            break
        start = len(ids) + len(text)
        if event.answer is not None:
            steps.append(Step(start, start + len(answer), start - written[event.variable]))
            prompt = start + len(answer) + len(end) if len(steps) == PROMPT_STEPS else prompt
        ids += text + answer + end
        written[event.variable] = len(ids)
    if len(steps) <= PROMPT_STEPS:
        raise ConversionError(f"{task}: the length is too short for one step of it")
    return Trace(tuple(ids[:prompt]), tuple(ids[prompt:]), tuple(steps[PROMPT_STEPS:]))


def _state_events(seed: int) -> Iterator[_Event]:
    """Assign a new variable, then read one whose age in steps is log-uniform, never one twice."""
    rng = random.Random(f"state {seed}")
    names = _names(rng)
    values: list[str] = []
    unread: list[int] = []
    for number, name in enumerate(names):
        values.append(str(rng.randint(10_000, 99_999)))
        yield _Event(f"{name} = {values[-1]}", number)
        unread.append(number)
        if number % 2:  # every second time, so that there are ever older ones to read
            age = int(len(unread) ** rng.random())  # 1 to all
            chosen = unread.pop(len(unread) - age)
            yield _Event(f"assert {names[chosen]} == ", chosen, values[chosen])


def _counter_events(seed: int) -> Iterator[_Event]:
    """Set the counters, then change one at a time and state its new value."""
    rng = random.Random(f"counters {seed}")
    names = _names(rng)[:COUNTERS]
    values = [rng.randint(100, 999) for _ in names]
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        yield _Event(f"{name} = {value}", number)
    while True:
        number, step = rng.randrange(COUNTERS), rng.randint(1, 9)
        # The distance of a step is that of the last stated value, so the change is part of it.
        values[number] += step
        name = names[number]
        yield _Event(f"{name} += {step}\nassert {name} == ", number, str(values[number]))


def _names(rng: random.Random) -> Sequence[str]:
    """All names of three words, shuffled: enough for a trace of 300K tokens."""
    names = [f"{a}_{b}_{c}" for a in FIRST_WORDS for b in FIRST_WORDS for c in SECOND_WORDS]
    rng.shuffle(names)
    return names
