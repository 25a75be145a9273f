"""The pictures of a report, as PNG; needs matplotlib (extra `plot`)."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from conversion.evaluation.options import GRID_TASKS
from conversion.evaluation.plots import accuracy_figure, grid_figure, loss_figure
from conversion.evaluation.report import EvalReport
from conversion.report.ablation_plot import ablation_figure
from conversion.report.age_bias_plot import age_bias_figure
from conversion.report.attended import attended_points
from conversion.report.attended_plot import attended_figure
from conversion.report.contents import Contents
from conversion.report.head_map_plot import head_map_figure
from conversion.report.indexer_plot import blocks_figure, kept_mass_figure
from conversion.report.loss_gap_plot import loss_gap_figure, loss_gaps
from conversion.report.score_plot import score_figure
from conversion.report.training_plot import training_figure

DOTS_PER_INCH = 150
CYCLE = ("#444444", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.prop_cycle": f"cycler('color', {list(CYCLE)!r})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 9.0,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "legend.fontsize": "small",
    "legend.frameon": False,
    "text.parse_math": False,  # names are not trusted to be formulas
}


def has_matplotlib() -> bool:
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        return False
    return True


def draw_pictures(contents: Contents) -> dict[str, bytes]:
    """PNG files by name; only those whose data are there."""
    import matplotlib as mpl

    pictures = {}
    with mpl.rc_context():
        mpl.rcdefaults()  # a person's own matplotlibrc has no say here
        mpl.rcParams.update(STYLE)
        for name, figure in _figures(contents):
            drawn, file = figure(), io.BytesIO()
            for axes in drawn.axes:
                if axes.images:  # a heat map has its own raster
                    axes.grid(visible=False)
            # No software version in the file: the same numbers give the same bytes.
            drawn.savefig(file, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
            pictures[name] = file.getvalue()
    return pictures


def numbered(stem: str, group: int) -> str:
    """File name of a picture of the evaluation group `group`, from 0."""
    return f"{stem}.png" if group == 0 else f"{stem}-{group + 1}.png"


def _figures(contents: Contents) -> Iterator[tuple[str, Callable[[], Any]]]:
    model, heads, indexer = contents.model, contents.heads, contents.indexer
    yield "head-map.png", partial(head_map_figure, model, heads)
    if heads is not None:
        yield "scores.png", partial(score_figure, model, heads)
    if indexer is not None:
        if indexer.mean_curve("anywhere"):
            yield "kept-mass.png", partial(kept_mass_figure, indexer)
        yield "blocks.png", partial(blocks_figure, indexer)
        if indexer.has_age_bias:
            yield "age-bias.png", partial(age_bias_figure, indexer)
    distil = contents.distil
    has_losses = indexer is not None and indexer.losses
    if has_losses or (distil is not None and (distil.losses or distil.validations)):
        yield "training.png", partial(training_figure, indexer, distil)
    for number, report in enumerate(contents.groups()):
        yield from _of_evaluation(number, report)
    lines = contents.ablation_lines()
    if any(line.score is not None for line in lines):
        yield "ablations.png", partial(ablation_figure, lines)


def _of_evaluation(number: int, report: EvalReport) -> Iterator[tuple[str, Callable[[], Any]]]:
    if points := attended_points(report):
        yield numbered("attended", number), partial(attended_figure, points)
    if report.by_task:
        yield numbered("accuracy", number), partial(accuracy_figure, report)
    if report.curves:
        yield numbered("loss", number), partial(loss_figure, report)
    if gaps := loss_gaps(report):
        yield numbered("loss-gap", number), partial(loss_gap_figure, gaps, report.variants[0])
    for task in GRID_TASKS:
        if any(cell.task == task for cell in report.cells):
            yield numbered(task, number), partial(grid_figure, report, task)
