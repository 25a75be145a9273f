"""Panels that occur again and again: one number, lines, quantiles beside their heat map."""

from __future__ import annotations

from docker.grafana.boards.panel import Panel, Query, Step
from docker.grafana.boards.promql import heat, mean, quantile


def number(
    title: str,
    text: str,
    unit: str,
    expr: str,
    *,
    width: int = 3,
    steps: tuple[Step, ...] = (),
    words: tuple[tuple[str, str], ...] = (),
    empty: str | None = None,
) -> Panel:
    """One figure in large type, with its recent course behind it."""
    return Panel(
        kind="stat", title=title, text=text, unit=unit, queries=(Query(expr, title, empty),),
        width=width, height=4, steps=steps, words=words,
    )  # fmt: skip


def lines(
    title: str,
    text: str,
    unit: str,
    *queries: Query,
    width: int = 12,
    stacked: bool = False,
    logarithmic: bool = False,
    steps: tuple[Step, ...] = (),
    maximum: float | None = None,
    colors: tuple[tuple[str, str], ...] = (),
) -> Panel:
    """Values over time, from zero on."""
    return Panel(
        kind="timeseries", title=title, text=text, unit=unit, queries=queries, width=width,
        stacked=stacked, logarithmic=logarithmic, steps=steps, minimum=None if logarithmic else 0,
        maximum=maximum, colors=colors,
    )  # fmt: skip


def spread(
    title: str, text: str, unit: str, name: str, steps: tuple[Step, ...] = ()
) -> tuple[Panel, Panel]:
    """Median, p90, p99 and mean of a histogram, and its heat map beside them."""
    quantiles = [Query(quantile(q, name), f"p{q * 100:.0f}") for q in (0.5, 0.9, 0.99)]
    return (
        lines(title, text, unit, *quantiles, Query(mean(name), "mean"), steps=steps),
        Panel(
            kind="heatmap",
            title=f"{title}: heat map",
            text=f"{text} Each cell counts observations of one bucket; two bands are two kinds of "
            "request.",
            unit=unit,
            queries=(Query(heat(name), "{{le}}"),),
        ),
    )
