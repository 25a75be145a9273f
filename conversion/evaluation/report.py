"""What an evaluation found, as plain data: for tables, plots, JSON and the HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from conversion.evaluation.intervals import (
    Interval,
    ScoresByDocument,
    average,
    mean_score,
    paired_difference,
)
from conversion.evaluation.ruler.tasks import PAPER_COLUMNS, RULER_TASKS
from conversion.evaluation.text_agreement import Agreement, LossCurve

FORMAT_VERSION = 1


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
            scores: by variant; the first one is the reference.
        """
        reference, *others = scores
        by_document = scores[reference]
        return cls(
            task=task,
            length=length,
            setting=dict(setting),
            documents=len(by_document),
            questions=sum(map(len, by_document)),
            scores={name: mean_score(own) for name, own in scores.items()},
            differences={name: paired_difference(scores[name], by_document) for name in others},
            attended=dict(attended or {}),
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

    def as_dict(self) -> dict[str, Any]:
        """Ready for json.dumps."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}


def averages(cells: Sequence[Cell]) -> tuple[Average, ...]:
    """Per length: each group of tasks of which there are at least two."""
    found = []
    for length in sorted({cell.length for cell in cells}):
        here = [cell for cell in cells if cell.length == length]
        tasks = list(dict.fromkeys(cell.task for cell in here))
        for name, members in _groups(tasks).items():
            if len(members) > 1:
                found.append(_average(name, length, members, here))
    return tuple(found)


def task_average(task: str, length: int, cells: Sequence[Cell]) -> Average:
    """One task at one length over all its settings."""
    own = [cell for cell in cells if cell.task == task and cell.length == length]
    return Average(
        name=task,
        length=length,
        tasks=(task,),
        scores={name: average([c.scores[name] for c in own]) for name in own[0].scores},
        differences={
            name: average([c.differences[name] for c in own]) for name in own[0].differences
        },
    )


def _groups(tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Averages to show: all of RULER, the paper's columns, code facts, traces."""
    ruler = tuple(task for task in tasks if task in RULER_TASKS)
    groups = {"ruler": ruler}
    if len(ruler) == len(RULER_TASKS):
        groups["ruler, columns of the paper"] = tuple(PAPER_COLUMNS)
    for family in ("code", "trace"):
        groups[family] = tuple(task for task in tasks if task.startswith(family + "_"))
    return groups


def _average(name: str, length: int, members: Sequence[str], cells: Sequence[Cell]) -> Average:
    parts = [
        _column(PAPER_COLUMNS[member], length, cells)
        if member in PAPER_COLUMNS
        else task_average(member, length, cells)
        for member in members
    ]
    return _mean_of(name, length, members, parts)


def _column(tasks: Sequence[str], length: int, cells: Sequence[Cell]) -> Average:
    return _mean_of("", length, tasks, [task_average(task, length, cells) for task in tasks])


def _mean_of(name: str, length: int, tasks: Sequence[str], parts: Sequence[Average]) -> Average:
    first = parts[0]
    return Average(
        name=name,
        length=length,
        tasks=tuple(tasks),
        scores={v: average([part.scores[v] for part in parts]) for v in first.scores},
        differences={
            v: average([part.differences[v] for part in parts]) for v in first.differences
        },
    )
