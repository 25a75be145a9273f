"""Files of `rtpurbo eval --json` and `rtpurbo ablate`, read back and checked. Torch-free but for
what the evaluation itself imports.

A file comes from a person's disk: everything that the tables and plots rely on is checked here,
once, and refused in one line that names the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter, ValidationError

from conversion.errors import ConversionError
from conversion.evaluation.intervals import Interval
from conversion.evaluation.options import GRID_TASKS
from conversion.evaluation.report import FORMAT_VERSION, Average, Cell, EvalReport


@dataclass(frozen=True, slots=True)
class Ablation:
    """A model with one part changed, and what it scored."""

    name: str
    description: str
    report: EvalReport


@dataclass(frozen=True, slots=True)
class Ablations:
    """What each part of a converted model is worth, in the order of the file."""

    variants: tuple[Ablation, ...] = ()
    skipped: Mapping[str, str] | None = None  # name: why it was left out

    def as_dict(self) -> dict[str, Any]:
        """The form of the file."""
        return {
            "variants": {
                own.name: {"description": own.description, "report": own.report.as_dict()}
                for own in self.variants
            },
            "skipped": dict(self.skipped or {}),
        }


def read_value(path: Path) -> Any:
    """The JSON value of a file; raises ConversionError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConversionError(f"{path}: not JSON") from None


def read_evaluation(path: Path) -> EvalReport:
    """What `rtpurbo eval --json` printed; raises ConversionError."""
    return parse_evaluation(read_value(path), str(path))


def read_ablations(path: Path) -> Ablations:
    """What `rtpurbo ablate` wrote; raises ConversionError."""
    return parse_ablations(read_value(path), str(path))


def parse_evaluation(value: Any, where: str) -> EvalReport:
    """
    Args:
        value: of `EvalReport.as_dict`.
        where: the file, for the message.

    Raises:
        ConversionError: another form, or numbers that cannot be.
    """
    if not isinstance(value, dict) or "format_version" not in value:
        raise ConversionError(f"{where}: not an evaluation as `rtpurbo eval --json` prints it")
    if value["format_version"] != FORMAT_VERSION:
        raise ConversionError(
            f"{where}: format_version must be {FORMAT_VERSION}, got {value['format_version']!r}"
        )
    report: EvalReport = validated(EvalReport, _with_documents(value), where)
    for problem in _problems(report):
        raise ConversionError(f"{where}: {problem}")
    return report if report.by_task else replace(report, by_task=tuple(_bounds(report.cells)))


def parse_ablations(value: Any, where: str) -> Ablations:
    """As `parse_evaluation`, of a dict {"variants": {name: {"description", "report"}}}."""
    variants = value.get("variants") if isinstance(value, dict) else None
    if not isinstance(variants, dict):
        raise ConversionError(f"{where}: not ablations: no object `variants`")
    found = []
    for name, item in variants.items():
        if not isinstance(item, dict) or not isinstance(item.get("description"), str):
            raise ConversionError(f"{where}: {name!r} has no description")
        report = parse_evaluation(item.get("report"), f"{where}: {name!r}")
        found.append(Ablation(name, item["description"], report))
    skipped: dict[str, str] = validated(dict[str, str], value.get("skipped", {}), where)
    return Ablations(tuple(found), skipped)


def validated(kind: Any, value: Any, where: str) -> Any:
    """`value` as a dataclass or other type; raises ConversionError with the first difference."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ConversionError(f"{where}: {place}: {first['msg']}".replace("\n", " ")) from None


def _with_documents(value: Mapping[str, Any]) -> dict[str, Any]:
    """The scores by document are not in the JSON; a cell without them says {}."""
    cells = value.get("cells")
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        return dict(value)
    return {**value, "cells": [{**cell, "by_document": {}} for cell in cells]}


def _bounds(cells: Sequence[Cell]) -> Iterator[Average]:
    """Tasks over their settings from a file that does not have them.

    The scores by document are gone, so the settings count as if they were asked of the very same
    text: their intervals' bounds are averaged, which is never too narrow.
    """

    def mean(intervals: Sequence[Interval]) -> Interval:
        return Interval(
            fmean(own.value for own in intervals),
            fmean(own.low for own in intervals),
            fmean(own.high for own in intervals),
        )

    for task, length in dict.fromkeys((cell.task, cell.length) for cell in cells):
        own = [cell for cell in cells if (cell.task, cell.length) == (task, length)]
        yield Average(
            name=task,
            length=length,
            tasks=(task,),
            scores={name: mean([cell.scores[name] for cell in own]) for name in own[0].scores},
            differences={
                name: mean([cell.differences[name] for cell in own]) for name in own[0].differences
            },
        )


def _problems(report: EvalReport) -> Iterator[str]:
    """What no evaluation prints; the first one is told."""
    if not report.variants or len(set(report.variants)) < len(report.variants):
        yield "variants: must be named, each once"
    for number, cell in enumerate(report.cells):
        if problem := _cell_problem(cell, report.variants):
            yield f"cells.{number}: {problem}"
    for number, line in enumerate((*report.averages, *report.by_task)):
        if problem := _score_problem(line, report.variants):
            yield f"averages.{number}: {problem}"
    for number, agreement in enumerate(report.agreements):
        values = (agreement.kl_mean, agreement.kl_median, agreement.kl_p99)
        if agreement.variant not in report.variants:
            yield f"agreements.{number}: of an unknown variant"
        if agreement.length < 1 or not all(map(math.isfinite, values)):
            yield f"agreements.{number}: length and KL must be numbers"
    for number, curve in enumerate(report.curves):
        if curve.variant not in report.variants:
            yield f"curves.{number}: of an unknown variant"
        rising = all(a < b for a, b in zip(curve.edges, curve.edges[1:], strict=False))
        if curve.length < 1 or not rising or len(curve.edges) != len(curve.losses) + 1:
            yield f"curves.{number}: edges must rise, one more than losses"
        if not curve.losses or not all(map(math.isfinite, (*curve.losses, curve.mean))):
            yield f"curves.{number}: losses must be numbers"


def _cell_problem(cell: Cell, variants: Sequence[str]) -> str | None:
    if not all(0 <= share <= 1 for share in cell.attended.values()):
        return "attended must be from 0 to 1"
    if cell.task in GRID_TASKS:
        try:
            depth = float(cell.setting["depth"])
        except (KeyError, ValueError):
            depth = math.nan
        if not 0 <= depth <= 1:
            return "depth must be from 0 to 1"
    return _score_problem(cell, variants)


def _score_problem(line: Cell | Average, variants: Sequence[str]) -> str | None:
    if line.length < 1:
        return "length must be at least 1"
    if set(line.scores) != set(variants) or set(line.differences) != set(variants[1:]):
        return f"must have scores of {', '.join(variants)}, and differences from the first"
    if not all(_is_interval(score, 0) for score in line.scores.values()):
        return "scores must be from 0 to 1"
    if not all(_is_interval(gap, -1) for gap in line.differences.values()):
        return "differences must be from -1 to 1"
    return None


def _is_interval(interval: Interval, least: float) -> bool:
    values = (interval.value, interval.low, interval.high)
    slack = 1e-9  # rounding of the sums behind them
    inside = all(least - slack <= value <= 1 + slack for value in values)
    # A difference's interval is adjusted towards 0 and need not hold the estimate (Bonett, Price).
    return inside and interval.low <= interval.high
