"""What an evaluation found, as plain data: for tables, plots, JSON and the HTML report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from conversion.evaluation.intervals import (
    Interval,
    ScoresByDocument,
    Stratum,
    average_difference,
    average_score,
    differences,
    mean_score,
    paired_difference,
)
from conversion.evaluation.options import GRID_TASKS
from conversion.evaluation.ruler.tasks import PAPER_COLUMNS, RULER_TASKS
from conversion.evaluation.text_agreement import Agreement, LossCurve

FORMAT_VERSION = 1
AGGREGATION = frozenset({"cwe", "fwe", "code_frequent"})  # answers that stand nowhere in the text


@dataclass(frozen=True, slots=True)
class Cell:
    """One task at one length under one setting, every variant on the same samples."""

    task: str
    length: int  # tokens
    setting: Mapping[str, str]  # such as {"facts": "16"}, {"depth": "0.25"}; empty if there is none
    documents: int
    questions: int
    scores: Mapping[str, Interval]  # by variant, 0 to 1
    differences: Mapping[str, Interval]  # variant minus the first variant, on the same questions
    attended: Mapping[str, float]  # share of the context, where a variant selects
    by_document: Mapping[str, ScoresByDocument]
    """By variant, what the intervals are made of; not in the JSON."""

    @classmethod
    def of(
        cls,
        task: str,
        length: int,
        setting: Mapping[str, str],
        scores: Mapping[str, ScoresByDocument],
        attended: Mapping[str, float] | None = None,
    ) -> Cell:
        """
        Args:
            scores: by variant; the first one is the reference. Documents without a question are
                (), so that document i is the same text in every cell.
        """
        reference, *others = scores
        by_document = scores[reference]
        return cls(
            task=task,
            length=length,
            setting=dict(setting),
            documents=sum(map(bool, by_document)),
            questions=sum(map(len, by_document)),
            scores={name: mean_score(own) for name, own in scores.items()},
            differences={name: paired_difference(scores[name], by_document) for name in others},
            attended=dict(attended or {}),
            by_document=dict(scores),
        )


@dataclass(frozen=True, slots=True)
class Average:
    """Plain mean over tasks at one length; a task is the mean of its settings."""

    name: str
    length: int
    tasks: tuple[str, ...]
    scores: Mapping[str, Interval]
    differences: Mapping[str, Interval]


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Everything that was measured. The first variant is the reference of all differences."""

    model: str
    variants: tuple[str, ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...]  # what stands in for what
    cells: tuple[Cell, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    curves: tuple[LossCurve, ...] = ()
    seconds: float = 0.0
    averages: tuple[Average, ...] = field(default=())
    by_task: tuple[Average, ...] = ()  # each task over its settings, by length

    def with_cells(self, cells: Iterable[Cell]) -> EvalReport:
        """The report with these cells, and the averages over them."""
        given = tuple(cells)
        return replace(self, cells=given, averages=averages(given), by_task=task_averages(given))

    def as_dict(self) -> dict[str, Any]:
        """Ready for json.dumps."""
        found = asdict(self)
        for cell in found["cells"]:
            del cell["by_document"]
        return {"format_version": FORMAT_VERSION, **found}


def joined_reports(reports: Sequence[EvalReport]) -> EvalReport:
    """Parts of one evaluation, by task and length, as one; settings are those of the first."""
    joined = reports[0].with_cells(cell for report in reports for cell in report.cells)
    return replace(
        joined,
        agreements=tuple(line for report in reports for line in report.agreements),
        curves=tuple(curve for report in reports for curve in report.curves),
        seconds=sum(report.seconds for report in reports),
    )


def averages(cells: Sequence[Cell]) -> tuple[Average, ...]:
    """Per length: each group of tasks of which there are at least two, and retrieval anyway."""
    found = []
    for length in sorted({cell.length for cell in cells}):
        here = [cell for cell in cells if cell.length == length]
        tasks = list(dict.fromkeys(cell.task for cell in here))
        for name, members in _groups(tasks).items():
            if len(members) > 1 or (members and name == "retrieval"):
                found.append(_average(name, length, members, here))
    return tuple(found)


def task_averages(cells: Sequence[Cell]) -> tuple[Average, ...]:
    """Each task at each length over all its settings, in the order of the cells."""
    places = dict.fromkeys((cell.task, cell.length) for cell in cells)
    return tuple(task_average(task, length, cells) for task, length in places)


def task_average(task: str, length: int, cells: Sequence[Cell]) -> Average:
    """One task at one length over all its settings."""
    own = [cell for cell in cells if cell.task == task and cell.length == length]
    return _average(task, length, (task,), own)


def _groups(tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Averages to show: all of RULER, the paper's columns, code facts, traces; and retrieval.

    That is every task whose answer stands in its text, one or several times, of whatever kind.
    """
    ruler = tuple(task for task in tasks if task in RULER_TASKS)
    groups = {"ruler": ruler}
    if len(ruler) == len(RULER_TASKS):
        groups["ruler, columns of the paper"] = tuple(PAPER_COLUMNS)
    for family in ("code", "trace"):
        groups[family] = tuple(task for task in tasks if task.startswith(family + "_"))
    answered = {*ruler, *groups["code"], *GRID_TASKS, "kv"} - AGGREGATION
    groups["retrieval"] = tuple(task for task in tasks if task in answered)
    return groups


def _average(name: str, length: int, members: Sequence[str], cells: Sequence[Cell]) -> Average:
    weighted = _weighted(members, cells)
    reference, *others = weighted[0][1].by_document
    return Average(
        name=name,
        length=length,
        tasks=tuple(members),
        scores={
            variant: average_score([Stratum(w, cell.by_document[variant]) for w, cell in weighted])
            for variant in (reference, *others)
        },
        differences={
            variant: average_difference(
                [
                    Stratum(w, differences(cell.by_document[variant], cell.by_document[reference]))
                    for w, cell in weighted
                ]
            )
            for variant in others
        },
    )


def _weighted(members: Sequence[str], cells: Sequence[Cell]) -> list[tuple[float, Cell]]:
    """Cells with their weights: a member counts once, and so does a task of a paper's column."""
    found: list[tuple[float, Cell]] = []
    for member in members:
        tasks = PAPER_COLUMNS.get(member, (member,))
        for task in tasks:
            own = [cell for cell in cells if cell.task == task]
            found += [(1 / len(members) / len(tasks) / len(own), cell) for cell in own]
    return found
