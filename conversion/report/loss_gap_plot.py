"""What sparse attention adds to the loss, by position; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conversion.evaluation.report import EvalReport
from conversion.evaluation.text_agreement import LossCurve

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


@dataclass(frozen=True, slots=True)
class LossGap:
    """A variant's loss against the first variant's on the same text."""

    variant: str
    length: int
    decoded_from: int  # positions before it are the prompt
    edges: tuple[int, ...]
    gaps: tuple[float, ...]  # nats per token, by position
    decoded_mean: float  # of decoded tokens
    decoded_reference: float


def loss_gaps(report: EvalReport) -> list[LossGap]:
    """Of every variant but the first, where both have the same positions."""
    first: dict[int, LossCurve] = {
        curve.length: curve for curve in report.curves if curve.variant == report.variants[0]
    }
    found = []
    for curve in report.curves:
        other = first.get(curve.length)
        if other is None or curve.variant == other.variant or curve.edges != other.edges:
            continue
        gaps = tuple(a - b for a, b in zip(curve.losses, other.losses, strict=True))
        found.append(
            LossGap(
                variant=curve.variant,
                length=curve.length,
                decoded_from=curve.decoded_from,
                edges=curve.edges,
                gaps=gaps,
                decoded_mean=curve.decoded_mean,
                decoded_reference=other.decoded_mean,
            )
        )
    return found


def loss_gap_figure(gaps: Sequence[LossGap], reference: str) -> Any:
    """A panel per length; a dotted line where decoding begins."""
    from matplotlib.figure import Figure

    lengths = sorted({gap.length for gap in gaps})
    names = list(dict.fromkeys(gap.variant for gap in gaps))
    figure = Figure(figsize=(max(5.0, 3.2 * len(lengths)), 3.0), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False)[0]
    for axes, length in zip(panels, lengths, strict=True):
        axes.axhline(0, color="#444444", linewidth=1.0)
        for gap in (gap for gap in gaps if gap.length == length):
            colour = COLOURS[names.index(gap.variant) % len(COLOURS)]
            axes.stairs(gap.gaps, gap.edges, baseline=None, color=colour, label=gap.variant)
            axes.axvline(gap.decoded_from, color="#888888", linestyle=":")
        axes.set(title=f"{length:,} tokens", xlabel="position")
    panels[0].set_ylabel(f"loss above {reference}, nats per token")
    panels[0].legend()
    return figure
