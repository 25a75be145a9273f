"""What the index of every retrieval head adds for the age of a block; needs matplotlib."""

from __future__ import annotations

from typing import Any

from conversion.report.facts import IndexerFacts
from kernels.block_age import AGE_RANGES


def age_bias_figure(indexer: IndexerFacts) -> Any:
    """A step line per head over ages in blocks, as far as documents of the fit reached."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.8), layout="constrained")
    axes = figure.subplots()
    biases = {(head.layer, head.head): head.age_bias for head in indexer.heads if head.age_bias}
    ranges = max(_reached(bias) for bias in biases.values())
    layers = sorted({layer for layer, _ in biases})
    for (layer, head), bias in biases.items():
        axes.plot(
            range(ranges),
            bias[:ranges],
            color=f"C{layers.index(layer)}",
            linestyle=("-", "--", ":", "-.")[head % 4],
            marker=".",
            label=f"{layer}, {head}",
        )
    axes.set(xticks=range(ranges), xticklabels=[_name(number) for number in range(ranges)])
    axes.set(xlabel="blocks back from the query's own", ylabel="bias, nats")
    axes.legend(title="layer, head", ncols=1 + len(biases) // 12, fontsize="x-small")
    return figure


def _reached(bias: tuple[float, ...]) -> int:
    """Ranges up to the one that the others are relative to: it and what is past it are 0."""
    last = max((number for number, value in enumerate(bias) if value), default=0)
    return min(last + 2, len(bias))


def _name(number: int) -> str:
    """The ages of a range: 0, 1, 2-3, 4-7, ..."""
    first, stop = 1 << number >> 1, 1 << number
    if number == AGE_RANGES - 1:
        return f"{first} on"
    return str(first) if stop - first <= 1 else f"{first}-{stop - 1}"
