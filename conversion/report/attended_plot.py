"""Tokens that the retrieval heads attended, over context length; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conversion.report.attended import AttendedPoint

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def attended_figure(points: Sequence[AttendedPoint]) -> Any:
    """A line per variant, its band from the task that needs fewest to the one that needs most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    tokens, shares = figure.subplots(1, 2)
    lengths = sorted({point.length for point in points})
    tokens.plot(lengths, lengths, color="#444444", linestyle=":", label="dense")
    for number, name in enumerate(dict.fromkeys(point.variant for point in points)):
        own = [point for point in points if point.variant == name]
        colour = COLOURS[number % len(COLOURS)]
        places = [point.length for point in own]
        tokens.plot(places, [point.tokens for point in own], marker="o", color=colour, label=name)
        tokens.fill_between(
            places, [p.least for p in own], [p.most for p in own], color=colour, alpha=0.18
        )
        shares.plot(places, [100 * point.share for point in own], marker="o", color=colour)
        shares.fill_between(
            places,
            [100 * point.least / point.length for point in own],
            [100 * point.most / point.length for point in own],
            color=colour,
            alpha=0.18,
        )
    for axes in (tokens, shares):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_xlabel("context in tokens")
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    tokens.set_ylabel("tokens attended per retrieval head")
    shares.set_ylabel("share of the context, %")
    tokens.legend(loc="upper left")
    return figure
