"""Which evaluations are shown as one: files of one model that measured different things."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from conversion.evaluation.report import EvalReport


def grouped(evaluations: Sequence[EvalReport]) -> list[EvalReport]:
    """In their order; one that does not go with an earlier one stays by itself.

    Together are those of the same model and variants that measured nothing twice, such as a file
    for each length. Two files with the same average at a length stay apart: the average over the
    tasks of both cannot be made of them.
    """
    groups: list[list[EvalReport]] = []
    for report in evaluations:
        group = next((own for own in groups if _go_together(own, report)), None)
        if group is None:
            groups.append([report])
        else:
            group.append(report)
    return [_as_one(group) for group in groups]


def _go_together(group: Sequence[EvalReport], report: EvalReport) -> bool:
    same = (group[0].model, group[0].variants) == (report.model, report.variants)
    return same and all(_places(own).isdisjoint(_places(report)) for own in group)


def _as_one(group: Sequence[EvalReport]) -> EvalReport:
    """Settings are those that all agree on."""
    first, *others = group
    if not others:
        return first
    return replace(
        first,
        settings={
            name: value
            for name, value in first.settings.items()
            if all(own.settings.get(name) == value for own in others)
        },
        notes=tuple(dict.fromkeys(note for own in group for note in own.notes)),
        cells=tuple(cell for own in group for cell in own.cells),
        agreements=tuple(line for own in group for line in own.agreements),
        curves=tuple(curve for own in group for curve in own.curves),
        seconds=sum(own.seconds for own in group),
        averages=tuple(line for own in group for line in own.averages),
        by_task=tuple(line for own in group for line in own.by_task),
    )


def _places(report: EvalReport) -> set[str]:
    """What was measured where."""

    def keys() -> Iterator[tuple[object, ...]]:
        yield from (("cell", c.task, c.length, *sorted(c.setting.items())) for c in report.cells)
        yield from (("task", line.name, line.length) for line in report.by_task)
        yield from (("average", line.name, line.length) for line in report.averages)
        yield from (("text", a.variant, a.length, a.prompt) for a in report.agreements)
        yield from (("loss", c.variant, c.length) for c in report.curves)

    return {json.dumps(key) for key in keys()}
