"""Needle scores of all heads, best first; needs matplotlib."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from conversion.report.facts import HeadScores, ModelFacts

LEAST_SHOWN = 1e-4  # of a score; the axis is logarithmic
CHOSEN, OTHERS = "#d55e00", "#9aa5b1"


@dataclass(frozen=True, slots=True)
class RankedHead:
    """A head and its score over documents."""

    layer: int
    head: int
    score: float
    least: float | None
    most: float | None
    deviation: float | None
    chosen: bool


def ranked_heads(model: ModelFacts, heads: HeadScores) -> list[RankedHead]:
    """All heads, the best first; equal scores in the order of layers."""

    def at(table: list[list[float]] | None, layer: int, head: int) -> float | None:
        return None if table is None else table[layer][head]

    found = [
        RankedHead(
            layer,
            head,
            score,
            at(heads.scores_least, layer, head),
            at(heads.scores_most, layer, head),
            at(heads.scores_deviation, layer, head),
            head in model.retrieval_heads[layer],
        )
        for layer, row in enumerate(heads.scores)
        for head, score in enumerate(row)
    ]
    return sorted(found, key=lambda own: -own.score)


def score_figure(model: ModelFacts, heads: HeadScores) -> Any:
    """Score by rank with the span over documents; retrieval heads marked."""
    from matplotlib.figure import Figure

    ranked = ranked_heads(model, heads)
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for chosen, colour, name in ((False, OTHERS, "local"), (True, CHOSEN, "retrieval")):
        places = [(rank, own) for rank, own in enumerate(ranked, 1) if own.chosen == chosen]
        ranks = [rank for rank, _ in places]
        values = [max(own.score, LEAST_SHOWN) for _, own in places]
        size = 22 if chosen else 10
        axes.scatter(ranks, values, s=size, color=colour, label=name, zorder=3 if chosen else 2)
        spans = [
            (rank, max(own.least, LEAST_SHOWN), max(own.most, LEAST_SHOWN))
            for rank, own in places
            if own.least is not None and own.most is not None
        ]
        if spans:
            rank_list, least, most = zip(*spans, strict=True)
            axes.vlines(rank_list, least, most, color=colour, linewidth=1.0, alpha=0.8)
    axes.set(yscale="log", ylim=(LEAST_SHOWN * 0.8, 1.3))
    axes.yaxis.set_major_formatter("{x:g}")  # powers of ten need formulas, which are off
    axes.minorticks_off()
    axes.set(xlabel="rank of the head", ylabel="needle score")
    axes.legend(loc="upper right")
    return figure
