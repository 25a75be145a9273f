"""Tokens attended, accuracy, and text: a part for each group of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from conversion.evaluation.options import GRID_TASKS
from conversion.evaluation.report import EvalReport
from conversion.evaluation.tables import points_text, share_text
from conversion.report.attended import attended_points
from conversion.report.contents import Contents
from conversion.report.loss_gap_plot import loss_gaps
from conversion.report.plots import numbered
from conversion.report.section import (
    EVALUATE,
    Block,
    Bullets,
    Heading,
    Missing,
    Paragraph,
    Picture,
    Section,
    Table,
    counted,
)

Part = Callable[[int, EvalReport], Iterator[Block]]


def attended_section(contents: Contents) -> Section:
    """Tokens that retrieval heads attended, over context length."""
    missing = Missing("No evaluation says how many tokens were attended.", EVALUATE)
    return _section(contents, "attended", "Tokens attended", _attended, missing)


def accuracy_section(contents: Contents) -> Section:
    """Scores by task and length."""
    missing = Missing("No accuracy: no task with answers was evaluated.", EVALUATE)
    return _section(contents, "accuracy", "Accuracy", _accuracy, missing)


def text_section(contents: Contents) -> Section:
    """Loss by position, KL and top-1 agreement."""
    missing = Missing("No text was evaluated: no loss by position, KL or agreement.", EVALUATE)
    return _section(contents, "text", "Text", _text, missing)


def _section(contents: Contents, name: str, title: str, part: Part, missing: Missing) -> Section:
    groups = contents.groups()
    blocks: list[Block] = []
    for number, report in enumerate(groups):
        own = list(part(number, report))
        if own and (len(groups) > 1 or report.model != contents.model.name):
            blocks.append(Heading(f"{report.model}: {', '.join(report.variants)}"))
        blocks += own
    return Section(name, title, blocks or [missing])


def _attended(number: int, report: EvalReport) -> Iterator[Block]:
    points = attended_points(report)
    if not points:
        return
    yield Picture(
        numbered("attended", number),
        "Tokens that a retrieval head attended while decoding, mean over tasks; the band spans "
        "the tasks.",
    )
    yield Table(
        ("variant", "context, tokens", "attended", "share", "least", "most"),
        [
            (
                point.variant,
                f"{point.length:,}",
                f"{point.tokens:,.0f}",
                f"{point.share:.1%}",
                f"{point.least:,.0f}",
                f"{point.most:,.0f}",
            )
            for point in points
        ],
        "Tokens attended per retrieval head, over tasks and settings",
    )


def _accuracy(number: int, report: EvalReport) -> Iterator[Block]:
    if not report.cells:
        return
    questions = sum(cell.questions for cell in report.cells)
    yield Paragraph(
        f"{counted(questions, 'question')}; every variant answered the same ones. Bars and "
        "brackets are 95 % intervals; differences are paired."
    )
    if report.by_task:
        yield Picture(numbered("accuracy", number), "Score by length, a panel per task.")
    for task in GRID_TASKS:
        if any(cell.task == task for cell in report.cells):
            yield Picture(numbered(task, number), f"{task}: depth of the key by length.")
    yield _score_table(report)
    yield Bullets([f"Settings: {_settings(report)}.", *report.notes])


def _score_table(report: EvalReport) -> Table:
    first, *others = report.variants
    rows = [
        (
            cell.task,
            " ".join(f"{name} {value}" for name, value in cell.setting.items()),
            f"{cell.length:,}",
            f"{cell.questions:,}",
            *(share_text(cell.scores[name]) for name in report.variants),
            *(points_text(cell.differences[name]) for name in others),
            " ".join(f"{100 * share:.1f}" for share in cell.attended.values()),
        )
        for cell in report.cells
    ]
    columns = (
        "task",
        "setting",
        "context, tokens",
        "asked",
        *(f"{name}, %" for name in report.variants),
        *(f"{name} − {first}, points" for name in others),
        "attended, %",
    )
    return Table(columns, rows, "Scores by task and length", words=2)


def _text(number: int, report: EvalReport) -> Iterator[Block]:
    if report.curves:
        yield Picture(
            numbered("loss", number),
            "Loss on text by position; decoding begins at the dotted line.",
        )
    if gaps := loss_gaps(report):
        yield Picture(
            numbered("loss-gap", number),
            f"The same as a difference from {report.variants[0]}; above 0 is worse.",
        )
        yield Table(
            ("variant", "context, tokens", "loss decoded", report.variants[0], "difference"),
            [
                (
                    gap.variant,
                    f"{gap.length:,}",
                    f"{gap.decoded_mean:.4f}",
                    f"{gap.decoded_reference:.4f}",
                    _relative(gap.decoded_mean, gap.decoded_reference),
                )
                for gap in gaps
            ],
            "Loss of decoded tokens in nats",
        )
    if report.agreements:
        yield _agreement_table(report)


def _relative(value: float, reference: float) -> str:
    return f"{value / reference - 1:+.2%}" if reference else ""


def _agreement_table(report: EvalReport) -> Table:
    rows = [
        (
            line.variant,
            line.prompt,
            f"{line.length:,}",
            f"{line.tokens:,}",
            *(f"{value:.5f}" for value in (line.kl_mean, line.kl_median, line.kl_p99)),
            share_text(line.top1),
        )
        for line in report.agreements
    ]
    return Table(
        (
            "variant",
            "prompt",
            "context, tokens",
            "decoded",
            "mean KL",
            "median",
            "99th percentile",
            "same best guess, %",
        ),
        rows,
        f"Decoded text against {report.variants[0]}, KL in nats; prompt: prefilled by the "
        "variant's own rule (served) or as the dense model",
        words=2,
    )


def _settings(report: EvalReport) -> str:
    told = ("samples", "facts", "seed", "device", "dtype")
    return ", ".join(f"{name} {report.settings[name]}" for name in told if name in report.settings)
