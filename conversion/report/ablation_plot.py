"""What each part is worth, as bars; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conversion.report.ablation_lines import AblationLine

FIRST, OTHERS = "#0072b2", "#9aa5b1"
ROW_INCHES = 0.26
PANELS_PER_ROW = 3


def ablation_figure(lines: Sequence[AblationLine]) -> Any:
    """Score of every ablation that has one, a panel per length, the model as converted on top."""
    from matplotlib.figure import Figure

    scored = [line for line in lines if line.score is not None]
    lengths = sorted({line.length for line in scored})
    names = list(dict.fromkeys(line.name for line in scored))
    columns = min(len(lengths), PANELS_PER_ROW)
    rows = -(-len(lengths) // PANELS_PER_ROW)
    size = (3.0 + 2.4 * columns, rows * (1.1 + ROW_INCHES * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    for number, length in enumerate(lengths):
        axes = figure.add_subplot(rows, columns, number + 1)
        _bars(axes, [line for line in scored if line.length == length], names)
        axes.set(title=f"{length:,} tokens", xlabel="score, %")
        if number % columns:
            axes.set_yticklabels([])
    return figure


def _bars(axes: Any, lines: Sequence[AblationLine], names: Sequence[str]) -> None:
    for line in lines:
        assert line.score is not None
        row, score = names.index(line.name), line.score
        error = [
            [100 * max(0.0, score.value - score.low)],
            [100 * max(0.0, score.high - score.value)],
        ]
        axes.barh(
            row, 100 * score.value, xerr=error, height=0.72, capsize=2,
            color=OTHERS if row else FIRST, error_kw={"elinewidth": 1.0, "ecolor": "#333333"},
        )  # fmt: skip
        if not row:
            axes.axvline(100 * score.value, color=FIRST, linestyle=":", linewidth=1.0)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(0, 101), ylim=(len(names) - 0.4, -0.6))
    axes.grid(visible=False, axis="y")
