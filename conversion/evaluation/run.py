"""`rtpurbo eval MODEL`: score tasks, dense against sparse, in process or over HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import httpx
from rich.console import Console

from conversion.evaluation.http_endpoint import HttpEndpoint
from conversion.evaluation.in_process import InProcess
from conversion.evaluation.options import TEXT_TASK, EvalOptions
from conversion.evaluation.report import Cell, EvalReport
from conversion.evaluation.sample_maker import SampleMaker
from conversion.evaluation.samples import Sample
from conversion.evaluation.teacher_forced import Variant
from conversion.evaluation.text_agreement import TextMeasure, TextPass
from conversion.evaluation.trace_run import split_by_distance
from conversion.evaluation.traces import TRACE_TASKS, Trace, TraceTask
from conversion.evaluation.variants import load_variants
from conversion.progress_bar import progress_bar
from conversion.text_source import load_tokenizer

Advance = Callable[[], None]
Keep = Callable[[EvalReport], None]
SECRETS = ("api_key",)
DEFAULT_WINDOW = 8192  # tokens; parts the steps of a trace where no variant has a window


def _keep_nothing(report: EvalReport) -> None:
    """The end will do."""


class Subject(Protocol):
    """Whoever answers."""

    name: str
    attended_fraction: float | None

    def scores(self, samples: Sequence[Sample], advance: Advance) -> list[tuple[float, ...]]:
        """Scores per sample, one per question."""
        ...


class LocalSubject(Subject, Protocol):
    """One whose model is in this process."""

    @property
    def variant(self) -> Variant: ...

    def right_steps(self, traces: Sequence[Trace], advance: Advance) -> list[list[bool]]:
        """Which steps of each trace are answered exactly."""
        ...


def evaluate(
    model: Path,
    options: EvalOptions,
    console: Console,
    transport: httpx.AsyncBaseTransport | None = None,
    keep: Keep = _keep_nothing,
) -> EvalReport:
    """Measure a model folder, or with `options.urls` servers of it, whose tokenizer it gives.

    Args:
        console: shows progress; results and notes are the caller's to print (`print_report`).
        keep: gets what there is, at the beginning and after every task at every length, so that an
            evaluation which is ended has not been in vain.
        transport: replaces the network in tests.

    Raises:
        CheckpointError: the model folder is unusable; one line that names the file.
        ConversionError: options, texts or a server are unusable; one line.
    """
    started = time.monotonic()
    tokenizer = load_tokenizer(model)
    variants = {} if options.urls else load_variants(model, options)
    maker = SampleMaker(tokenizer, options)
    notes = maker.prepare()
    local = [InProcess(name, variant, tokenizer) for name, variant in variants.items()]
    servers = [
        HttpEndpoint(
            name,
            url,
            tokenizer,
            model=options.url_model,
            api_key=options.api_key,
            concurrency=options.concurrency,
            timeout=options.timeout,
            transport=transport,
        )
        for name, url in options.named_urls()
    ]
    run = EvalRun(options, maker, [*local, *servers], local, console)

    def timed(report: EvalReport) -> EvalReport:
        return replace(report, seconds=round(time.monotonic() - started, 1))

    return timed(run.measure(model.resolve().name, notes, lambda report: keep(timed(report))))


class EvalRun:
    """One pass over tasks and lengths."""

    def __init__(
        self,
        options: EvalOptions,
        maker: SampleMaker,
        subjects: Sequence[Subject],
        local: Sequence[LocalSubject],
        console: Console,
        window: int | None = None,
    ) -> None:
        """
        Args:
            subjects: who is compared; the first one is the reference.
            local: those of them that are in process.
            window: tokens; parts the steps of traces. None: that of the first subject that has one.
        """
        self._options = options
        self._maker = maker
        self._subjects = subjects
        self._local = local
        self._console = console
        self._window = window or _window(local)

    def measure(self, model: str, notes: tuple[str, ...], keep: Keep = _keep_nothing) -> EvalReport:
        """Everything the options ask for."""
        report = EvalReport(
            model=model,
            variants=tuple(subject.name for subject in self._subjects),
            settings=settings_of(self._options),
            notes=notes,
        )
        keep(report)  # what cannot be kept should turn out now
        for length, task in product(self._options.lengths, self._options.selected()):
            start = time.monotonic()
            report = self._with(report, task, length)
            seconds = time.monotonic() - start
            self._console.print(f"{task} {length}: {seconds:.1f} s", style="dim", highlight=False)
            keep(report)
        return report

    def _with(self, report: EvalReport, task: str, length: int) -> EvalReport:
        """The report with one task at one length more."""
        if task == TEXT_TASK:
            measure = self._text(length)
            return replace(
                report,
                agreements=(*report.agreements, *measure.agreements()),
                curves=(*report.curves, *measure.curves()),
            )
        found = self._traces(task, length) if task in TRACE_TASKS else self._answers(task, length)
        return report.with_cells((*report.cells, *found))

    def _answers(self, task: str, length: int) -> Iterator[Cell]:
        total = self._maker.settings(task, length) * self._options.samples * len(self._subjects)
        with self._progress(f"{task} {length}", total) as advance:
            for setting, samples in self._maker.cells(task, length):
                scores: dict[str, list[tuple[float, ...]]] = {}
                attended: dict[str, float] = {}
                for subject in self._subjects:
                    scores[subject.name] = subject.scores(samples, advance)
                    if subject.attended_fraction is not None:
                        attended[subject.name] = subject.attended_fraction
                yield Cell.of(task, length, setting, scores, attended)

    def _traces(self, task: TraceTask, length: int) -> Iterator[Cell]:
        """One cell per group of distances that has steps."""
        traces = self._maker.traces(task, length)
        groups: dict[str, dict[str, list[tuple[float, ...]]]] = {}
        with self._progress(f"{task} {length}", len(traces) * len(self._local)) as advance:
            for subject in self._local:
                right = subject.right_steps(traces, advance)
                edges = (self._window // 4, self._window)
                for group, scores in split_by_distance(traces, right, edges).items():
                    groups.setdefault(group, {})[subject.name] = scores
        for group, by_variant in groups.items():
            if any(map(any, by_variant.values())):
                yield Cell.of(task, length, {"distance": group}, by_variant)

    def _text(self, length: int) -> TextMeasure:
        """The reference, the others as served, and the sparse one behind a dense prompt."""
        passes = [TextPass(subject.name, subject.variant) for subject in self._local]
        passes += [
            TextPass(subject.name, subject.variant, dense_prompt=True)
            for subject in self._local[1:]
            if subject.name == "sparse"
        ]
        texts = self._maker.texts(length)
        measure = TextMeasure(passes, length, self._options.decoded)
        with self._progress(f"{TEXT_TASK} {length}", len(texts)) as advance:
            measure.run(texts, advance)
        return measure

    def _progress(self, name: str, total: int) -> AbstractContextManager[Advance]:
        return progress_bar(self._console, name, total, transient=True)


def _window(local: Sequence[LocalSubject]) -> int:
    """Of the first subject that has one, in tokens."""
    for subject in local:
        if subject.variant.config.sparse is not None:
            return subject.variant.config.sparse.window_tokens
    return DEFAULT_WINDOW


def settings_of(options: EvalOptions) -> dict[str, Any]:
    """The options as JSON, without secrets."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
        if name not in SECRETS
    }
