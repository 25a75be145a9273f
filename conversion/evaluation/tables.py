"""An evaluation on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from conversion.evaluation.intervals import Interval
from conversion.evaluation.report import Cell, EvalReport

WIDE = 160  # columns that every table fits into


def result_console() -> Console:
    """Standard output; as wide as tables need where it is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else WIDE)


def print_report(report: EvalReport, console: Console) -> None:
    """Every table that has something in it, then the notes."""
    tables = [
        _scores(report),
        _averages(report),
        _agreements(report),
        _losses(report),
    ]
    for table in tables:
        if table.row_count:
            console.print(table)
    for note in report.notes:
        console.print(note, highlight=False)


def _scores(report: EvalReport) -> Table:
    table = _table("accuracy in % with 95 % intervals", ("task", "length", "setting", "asked"))
    _add_variants(table, report.variants)
    table.add_column("attended", justify="right", overflow="fold")
    for cell in report.cells:
        table.add_row(
            cell.task,
            str(cell.length),
            " ".join(f"{name} {value}" for name, value in cell.setting.items()),
            str(cell.questions),
            *_score_cells(report.variants, cell.scores, cell.differences),
            _attended(cell),
        )
    return table


def _averages(report: EvalReport) -> Table:
    table = _table("averages over tasks in %", ("over", "tasks", "length"))
    _add_variants(table, report.variants)
    for line in report.averages:
        table.add_row(
            line.name,
            str(len(line.tasks)),
            str(line.length),
            *_score_cells(report.variants, line.scores, line.differences),
        )
    return table


def _agreements(report: EvalReport) -> Table:
    columns = ("variant", "length", "prompt", "tokens", "mean KL", "median", "99 %", "same top 1")
    table = _table(f"decoded text against {report.variants[0]}, KL in nats", columns)
    for line in report.agreements:
        kl = (f"{value:.5f}" for value in (line.kl_mean, line.kl_median, line.kl_p99))
        table.add_row(
            line.variant,
            str(line.length),
            line.prompt,
            str(line.tokens),
            *kl,
            share_text(line.top1),
        )
    return table


def _losses(report: EvalReport) -> Table:
    columns = ("variant", "length", "all", "decoded", "first part", "last part")
    table = _table("loss on text in nats per token", columns)
    for line in report.curves:
        values = (line.mean, line.decoded_mean, line.losses[0], line.losses[-1])
        table.add_row(line.variant, str(line.length), *(f"{value:.4f}" for value in values))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        if number == 0:
            table.add_column(column, no_wrap=True)
        else:
            table.add_column(column, justify="right", overflow="fold")
    return table


def _add_variants(table: Table, variants: Sequence[str]) -> None:
    for name in variants:
        table.add_column(name, justify="right", overflow="fold")
    for name in variants[1:]:
        table.add_column(f"{name} - {variants[0]}", justify="right", overflow="fold")


def _score_cells(
    variants: Sequence[str], scores: Mapping[str, Interval], differences: Mapping[str, Interval]
) -> list[str]:
    return [share_text(scores[name]) for name in variants] + [
        points_text(differences[name]) for name in variants[1:]
    ]


def share_text(interval: Interval) -> str:
    """A score and its interval in %."""
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points_text(interval: Interval) -> str:
    """A difference and its interval in points."""
    return f"{100 * interval.value:+.2f} [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"


def _attended(cell: Cell) -> str:
    return ", ".join(f"{100 * share:.1f}" for share in cell.attended.values())
