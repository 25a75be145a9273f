"""What each ablation scored, one line a length. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conversion.evaluation.intervals import Interval
from conversion.evaluation.report import Average, EvalReport
from conversion.report.attended import attended_points
from conversion.report.evaluation_file import Ablation, Ablations

KV_SETTING = "kv_bytes_per_token"  # of the settings of an ablation
PREFERRED = "retrieval"  # the average to compare by, if there is one


@dataclass(frozen=True, slots=True)
class AblationLine:
    """The changed model against the reference at one length. None: not measured."""

    name: str
    length: int  # tokens
    over: str | None  # what is averaged
    score: Interval | None
    difference: Interval | None  # from the reference, on the same questions
    attended_share: float | None  # of the context, by retrieval heads
    kl: float | None  # nats per decoded token, behind the model's own prompt
    top1: Interval | None  # share of decoded tokens with the reference's best guess
    loss: float | None  # nats per decoded token
    kv_bytes: int | None  # per token of context, with the windows, in bfloat16


def ablation_lines(ablations: Ablations) -> list[AblationLine]:
    """In the order of the file, lengths ascending."""
    return [_line(own, length) for own in ablations.variants for length in _lengths(own.report)]


def _lengths(report: EvalReport) -> list[int]:
    parts = (report.cells, report.agreements, report.curves)
    return sorted({item.length for part in parts for item in part})


def _line(own: Ablation, length: int) -> AblationLine:
    report, variant = own.report, own.report.variants[-1]
    average = _average(report, length)
    agreement = next(
        (
            line
            for line in report.agreements
            if (line.variant, line.length, line.prompt) == (variant, length, "served")
        ),
        None,
    )
    points = (p for p in attended_points(report) if (p.variant, p.length) == (variant, length))
    curves = (c for c in report.curves if (c.variant, c.length) == (variant, length))
    return AblationLine(
        name=own.name,
        length=length,
        over=None if average is None else average.name,
        score=None if average is None else average.scores[variant],
        difference=None if average is None else average.differences.get(variant),
        attended_share=next((point.share for point in points), None),
        kl=None if agreement is None else agreement.kl_mean,
        top1=None if agreement is None else agreement.top1,
        loss=next((curve.decoded_mean for curve in curves), None),
        kv_bytes=_kv_bytes(report, length),
    )


def _kv_bytes(report: EvalReport, length: int) -> int | None:
    """As the settings of an ablation say; other evaluations do not."""
    found: Any = report.settings.get(KV_SETTING)
    for key in (str(length), report.variants[-1]):
        found = found.get(key) if isinstance(found, dict) else None
    return found if type(found) is int else None


def _average(report: EvalReport, length: int) -> Average | None:
    """Over the retrieval tasks, else whatever is averaged first, else the only task."""
    here: Sequence[Average] = [line for line in report.averages if line.length == length]
    preferred = [line for line in here if line.name == PREFERRED]
    tasks = [line for line in report.by_task if line.length == length]
    found = [*preferred, *here, *(tasks if len(tasks) == 1 else ())]
    return found[0] if found else None
