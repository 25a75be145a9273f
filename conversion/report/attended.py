"""How many tokens the retrieval heads attended, over context length. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from conversion.evaluation.report import EvalReport


@dataclass(frozen=True, slots=True)
class AttendedPoint:
    """One variant at one length: means over decoded tokens, then over tasks and settings."""

    variant: str
    length: int  # tokens of prompt and answer
    share: float  # of the context
    tokens: float  # that share of `length`
    least: float  # tokens, of the task that needed fewest
    most: float


def attended_points(report: EvalReport) -> list[AttendedPoint]:
    """By variant, lengths ascending; nothing for variants that do not select."""
    points = []
    for variant in report.variants:
        for length in sorted({cell.length for cell in report.cells}):
            shares = [
                cell.attended[variant]
                for cell in report.cells
                if cell.length == length and variant in cell.attended
            ]
            if shares:
                share = fmean(shares)
                least, most = min(shares) * length, max(shares) * length
                points.append(AttendedPoint(variant, length, share, share * length, least, most))
    return points
