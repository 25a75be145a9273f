"""Heat map of the heads, layers down and query heads across; needs matplotlib."""

from __future__ import annotations

from typing import Any

from conversion.report.facts import HeadScores, ModelFacts

OUTLINE = "#d55e00"
CELL_INCHES = 0.34
LARGEST_INCHES = (9.4, 12.0)  # what a page shows without shrinking it
TICKS = 16  # at most, on each axis


def head_map_figure(model: ModelFacts, heads: HeadScores | None) -> Any:
    """Needle scores as colour, retrieval heads outlined; without scores the outlines alone."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    width, height = (
        min(most, max(least, CELL_INCHES * count + margin))
        for most, least, count, margin in (
            (LARGEST_INCHES[0], 5.0, model.query_heads, 1.8),
            (LARGEST_INCHES[1], 2.4, model.layers, 1.0),
        )
    )
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    blank = [[0.0] * model.query_heads for _ in range(model.layers)]
    scores = blank if heads is None else heads.scores
    # Scores differ by orders of magnitude: the root shows the heads between none and all.
    largest = max((max(layer) for layer in scores), default=0.0)
    image = axes.imshow(
        scores, aspect="auto", cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=largest or 1.0)
    )
    _outline(axes, model)
    group = model.query_heads // model.kv_heads
    if group > 1:
        edges = [head - 0.5 for head in range(group, model.query_heads, group)]
        axes.vlines(edges, -0.5, model.layers - 0.5, color="#bbbbbb", linewidth=0.6)
    axes.set(xlabel="query head", ylabel="layer")
    axes.set_xticks(_ticks(model.query_heads))
    axes.set_yticks(_ticks(model.layers))
    if heads is not None:
        figure.colorbar(image, ax=axes, label="needle score (root scale)")
    return figure


def _outline(axes: Any, model: ModelFacts) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes = [
        Rectangle((head - 0.46, layer - 0.46), 0.92, 0.92)
        for layer, chosen in enumerate(model.retrieval_heads)
        for head in chosen
    ]
    axes.add_collection(
        PatchCollection(boxes, facecolor="none", edgecolor=OUTLINE, linewidth=1.8, zorder=3)
    )


def _ticks(count: int) -> list[int]:
    return list(range(0, count, -(-count // TICKS)))
