"""Pictures of an evaluation; needs matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conversion.errors import ConversionError
from conversion.evaluation.options import GRID_TASKS
from conversion.evaluation.report import Average, EvalReport

PANELS_PER_ROW = 4
PANEL_INCHES = (3.2, 2.6)


def plot_report(report: EvalReport, folder: Path) -> list[Path]:
    """Write accuracy.png, loss.png and one passkey grid per variant, as far as there is data.

    Returns the files written.

    Raises:
        ConversionError: matplotlib is missing, or the folder cannot be written.
    """
    figures: dict[str, Any] = {}
    if report.by_task:
        figures["accuracy.png"] = accuracy_figure(report)
    if report.curves:
        figures["loss.png"] = loss_figure(report)
    for task in GRID_TASKS:
        if any(cell.task == task for cell in report.cells):
            figures[f"{task}.png"] = grid_figure(report, task)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=120)
    except OSError as error:
        raise ConversionError(f"{folder}: cannot be written ({error.strerror})") from None
    return [folder / name for name in figures]


def accuracy_figure(report: EvalReport) -> Any:
    """Score by length, a panel per task, a line per variant with its interval."""
    tasks = list(dict.fromkeys(line.name for line in report.by_task))
    figure = _figure(len(tasks))
    for axes, task in zip(_panels(figure, len(tasks)), tasks, strict=True):
        own = {line.length: line for line in report.by_task if line.name == task}
        lengths = sorted(own)
        points = [own[length] for length in lengths]
        for number, name in enumerate(report.variants):
            # A little apart, so that equal scores do not hide one another.
            _score_line(axes, name, [length * 1.03**number for length in lengths], points)
        axes.set(title=task, xlabel="length in tokens", ylim=(-0.03, 1.03))
        _length_axis(axes, lengths)
    figure.axes[0].set_ylabel("score")
    figure.axes[0].legend()
    return figure


def loss_figure(report: EvalReport) -> Any:
    """Loss by position, a panel per length; a dotted line where decoding begins."""
    lengths = sorted({curve.length for curve in report.curves})
    figure = _figure(len(lengths))
    for axes, length in zip(_panels(figure, len(lengths)), lengths, strict=True):
        curves = [curve for curve in report.curves if curve.length == length]
        for curve in curves:
            axes.stairs(curve.losses, curve.edges, label=curve.variant, baseline=None)
        axes.axvline(curves[0].decoded_from, linestyle=":", color="gray")
        axes.set(title=f"{length} tokens", xlabel="position")
    figure.axes[0].set_ylabel("nats per token")
    figure.axes[0].legend()
    return figure


def grid_figure(report: EvalReport, task: str) -> Any:
    """Depth by length, a panel per variant."""
    cells = [cell for cell in report.cells if cell.task == task]
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({float(cell.setting["depth"]) for cell in cells})
    figure = _figure(len(report.variants))
    for axes, name in zip(_panels(figure, len(report.variants)), report.variants, strict=True):
        found: Mapping[tuple[float, int], float] = {
            (float(cell.setting["depth"]), cell.length): cell.scores[name].value for cell in cells
        }
        grid = [
            [found.get((depth, length), float("nan")) for length in lengths] for depth in depths
        ]
        image = axes.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="RdYlGn")
        axes.set(title=f"{task}, {name}", xlabel="length in tokens", ylabel="depth")
        axes.set_xticks(range(len(lengths)), list(map(str, lengths)))
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    figure.colorbar(image, ax=list(figure.axes), label="score")
    return figure


def _score_line(axes: Any, name: str, lengths: Sequence[float], points: Sequence[Average]) -> None:
    scores = [point.scores[name] for point in points]
    values = [score.value for score in scores]
    below = [max(0.0, score.value - score.low) for score in scores]
    above = [max(0.0, score.high - score.value) for score in scores]
    axes.errorbar(lengths, values, yerr=[below, above], marker="o", capsize=3, label=name)


def _length_axis(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(lengths) / 1.5, max(lengths) * 1.5)  # also of a single length
    axes.set_xticks(list(lengths), list(map(str, lengths)))
    axes.minorticks_off()


def _figure(panels: int) -> Any:
    """
    Raises:
        ConversionError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConversionError("plots need matplotlib: pip install 'rtpurbo[plot]'") from None
    columns = min(panels, PANELS_PER_ROW)
    rows = -(-panels // PANELS_PER_ROW)
    width, height = PANEL_INCHES
    return Figure(figsize=(max(width * columns, 4), height * rows + 0.4), layout="constrained")


def _panels(figure: Any, count: int) -> list[Any]:
    columns = min(count, PANELS_PER_ROW)
    rows = -(-count // PANELS_PER_ROW)
    return [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
