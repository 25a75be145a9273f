"""Panels drawn by matplotlib from what Prometheus answers, in the places of Grafana's grid."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter
from PIL import Image

from docker.grafana.boards.board import Board, Row, placed
from docker.grafana.boards.panel import COLUMNS, Panel
from tests.observability.answers import Answers
from tests.observability.units import written

INCHES_PER_COLUMN = 0.62
INCHES_PER_LINE = 0.34
COLORS = {"green": "#37872d", "orange": "#e0752d", "red": "#c4162a"}
NAMED = {"blue": "#3274d9", "purple": "#8f3bb8", "yellow": "#d9b400", "dark-red": "#7a0c1b"}
LINES = ("#3274d9", "#e0752d", "#37872d", "#8f3bb8", "#c4162a", "#0f9fa3", "#b0892f", "#666666")


def draw_board(board: Board, answers: Answers, path: Path) -> None:
    """Draw a board as one PNG file."""
    items = list(placed(board))
    lines = max(place.y + place.height for _, place in items) + 1
    figure = Figure(figsize=(COLUMNS * INCHES_PER_COLUMN, lines * INCHES_PER_LINE), dpi=80)
    width, height = figure.get_size_inches()
    for item, place in items:
        left, top = place.x * INCHES_PER_COLUMN, (place.y + 1) * INCHES_PER_LINE
        if isinstance(item, Row):
            figure.text(
                (left + 0.15) / width, 1 - (top + 0.2) / height, item.title, fontsize=11,
                weight="bold", va="center",
            )  # fmt: skip
            continue
        wide, high = place.width * INCHES_PER_COLUMN, place.height * INCHES_PER_LINE
        _draw(figure, item, (left / width, 1 - (top + high) / height, wide / width, high / height),
              answers)  # fmt: skip
    figure.text(
        0.15 / width, 1 - 0.2 / height, board.title, fontsize=13, weight="bold", va="center"
    )
    note = f"{answers.minutes:.0f} minutes of a mixed load on two cores; drawn by matplotlib"
    figure.text(1 - 0.15 / width, 1 - 0.2 / height, note, fontsize=8, color="#666", va="center",
                ha="right")  # fmt: skip
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    """As a PNG of few colours, a third as large as one of all."""
    drawn = io.BytesIO()
    figure.savefig(drawn)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


Box = tuple[float, float, float, float]


def _draw(figure: Figure, panel: Panel, box: Box, answers: Answers) -> None:
    left, bottom, width, height = box
    if panel.kind == "stat":
        axes = figure.add_axes((left + 0.004, bottom + 0.004, width - 0.008, height - 0.008))
        _stat(axes, panel, answers.series[panel.queries[0].expr])
        return
    inner = (left + 0.055, bottom + 0.16 * height, width - 0.075, 0.70 * height)
    axes = figure.add_axes(inner)
    axes.set_title(panel.title, fontsize=9, loc="left", pad=4)
    found = [(query.legend, answers.series[query.expr]) for query in panel.queries]
    if panel.kind == "heatmap":
        _heat(axes, panel, found[0][1], answers.start)
    elif panel.kind == "bargauge":
        _bars(axes, panel, found)
        return
    else:
        _lines(axes, panel, found, answers)
    _time_axis(axes, answers)


def _stat(axes: Any, panel: Panel, series: list[dict[str, Any]]) -> None:
    value = float(series[0]["values"][-1][1]) if series else math.nan
    words = dict(panel.words)
    text = words.get(f"{value:g}", written(value, panel.unit))
    color = "#37872d"
    for step in panel.steps:
        if step.value is None or value >= step.value:
            color = COLORS[step.color]
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#ddd")
    axes.text(0.05, 0.84, panel.title, fontsize=8, va="center", transform=axes.transAxes)
    axes.text(0.5, 0.4, text, fontsize=17, weight="bold", color=color, ha="center", va="center",
              transform=axes.transAxes)  # fmt: skip


def _named(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)


def _points(one: dict[str, Any], start: float) -> tuple[Any, Any]:
    """Minutes since `start`, and values."""
    times = np.array([time for time, _ in one["values"]]) - start
    return times / 60, np.array([float(value) for _, value in one["values"]])


def _lines(axes: Any, panel: Panel, found: list[Any], answers: Answers) -> None:
    drawn = [
        (_named(legend, one["metric"]), *_points(one, answers.start))
        for legend, series in found
        for one in series
    ]
    colors = [_color(panel, name, i) for i, (name, _, _) in enumerate(drawn)]
    if panel.stacked and drawn:
        grid = np.arange(0, answers.minutes, answers.step / 60)
        axes.stackplot(
            grid, [_on_grid(grid, x, y) for _, x, y in drawn], colors=colors, alpha=0.75, lw=0,
            labels=[name for name, _, _ in drawn],
        )  # fmt: skip
    else:
        for (name, x, y), color in zip(drawn, colors, strict=True):
            axes.plot(x, y, lw=1.2, label=name, color=color)
    if panel.logarithmic:
        axes.set_yscale("symlog" if any((y == 0).any() for _, _, y in drawn) else "log")
    else:
        axes.set_ylim(bottom=0)
        if panel.unit in ("bytes", "Bps"):
            axes.yaxis.set_major_locator(FixedLocator(_binary_ticks(axes.get_ylim()[1])))
    axes.yaxis.set_major_formatter(lambda value, _: written(value, panel.unit))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#eee")
    axes.set_axisbelow(True)
    if not drawn:
        axes.text(0.5, 0.5, "none", color="#999", ha="center", transform=axes.transAxes)
        return
    axes.legend(fontsize=7, ncols=4, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.1),
                borderaxespad=0.2, handlelength=1.2)  # fmt: skip


def _color(panel: Panel, name: str, number: int) -> str:
    for pattern, color in panel.colors:
        if re.fullmatch(pattern, name):
            return {**COLORS, **NAMED}.get(color, color)
    return LINES[number % len(LINES)]


def _on_grid(grid: Any, x: Any, y: Any) -> Any:
    """Values at the places of a regular grid; 0 where the series has none."""
    found = np.zeros_like(grid)
    places = np.rint(x / (grid[1] - grid[0])).astype(int)
    inside = places < len(grid)
    found[places[inside]] = np.nan_to_num(y)[inside]
    return found


def _binary_ticks(top: float) -> list[float]:
    """Round numbers of KiB, MiB or GiB up to `top` bytes."""
    scale = 1024.0 ** int(math.log(max(top, 1), 1024))
    return [tick * scale for tick in MaxNLocator(6).tick_values(0, top / scale)]


def _heat(axes: Any, panel: Panel, series: list[dict[str, Any]], start: float) -> None:
    """Counts per bucket: the difference between a bucket and the one under it."""
    by_edge = sorted((float(one["metric"]["le"]), _points(one, start)) for one in series)
    times = by_edge[-1][1][0]
    cumulative = np.array([np.interp(times, x, y) for _, (x, y) in by_edge])
    counts = np.diff(cumulative, axis=0, prepend=0).clip(0)
    used = np.flatnonzero(counts.max(axis=1) > 1e-6)
    low, high = max(used[0] - 1, 0), min(used[-1] + 1, len(by_edge) - 1)
    shown = np.ma.masked_less(counts[low : high + 1], 1e-6)
    axes.pcolormesh(
        times, np.arange(high - low + 1), shown, cmap="Oranges", norm=PowerNorm(0.5, vmin=0),
        shading="nearest",
    )  # fmt: skip
    names = [
        "more" if math.isinf(edge) else written(edge, panel.unit)
        for edge, _ in by_edge[low : high + 1]
    ]
    stride = max(1, len(names) // 9)
    axes.set_yticks(np.arange(0, len(names), stride) + 0.5, names[::stride])


def _bars(axes: Any, panel: Panel, found: list[Any]) -> None:
    bars = [
        (_named(legend, one["metric"]), float(one["values"][-1][1]))
        for legend, series in found
        for one in series
    ]
    axes.barh([name for name, _ in bars], [value for _, value in bars], color=LINES[0], height=0.4)
    axes.set_xlim(panel.minimum, panel.maximum)
    axes.set_ylim(-1.5, max(len(bars), 2) + 0.5)
    axes.xaxis.set_major_formatter(lambda value, _: written(value, panel.unit))
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _time_axis(axes: Any, answers: Answers) -> None:
    axes.set_xlim(0, answers.minutes)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} min")
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
