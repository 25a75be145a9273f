"""How well the index selects: kept mass, blocks, KL; needs matplotlib."""

from __future__ import annotations

from typing import Any

from conversion.report.facts import IndexerFacts

KINDS = (("anywhere", "any position", "#0072b2"), ("answers", "answers", "#d55e00"))


def kept_mass_figure(indexer: IndexerFacts) -> Any:
    """Attention mass kept over top_p, a thin line per head and a thick one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axes, (queries, name, colour) in zip(panels, KINDS, strict=True):
        for head in indexer.heads:
            top_p = [point.top_p for point in head.curve]
            kept = [getattr(point, queries).kept_mass for point in head.curve]
            axes.plot(top_p, kept, color=colour, linewidth=0.7, alpha=0.35)
        mean = indexer.mean_curve(queries)
        axes.plot(
            [top_p for top_p, _ in mean],
            [quality.kept_mass for _, quality in mean],
            color=colour,
            marker="o",
            linewidth=2.0,
            label="mean of the heads",
        )
        axes.axline((0.5, 0.5), slope=1, color="#888888", linestyle=":", label="asked for")
        axes.set(xlim=(0.48, 1.005), ylim=(None, 1.02), title=f"queries at {name}", xlabel="top_p")
        axes.legend(loc="lower right")
    panels[0].set_ylabel("attention mass kept")
    return figure


def blocks_figure(indexer: IndexerFacts) -> Any:
    """Blocks selected against those the true attention needs; KL before and after training."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8.0, 3.8), layout="constrained")
    blocks, kl = figure.subplots(1, 2)
    least, most = 1e6, 1.0
    for queries, name, colour in KINDS:
        own = [getattr(head, queries) for head in indexer.heads]
        before = [getattr(head.closed_form, queries) for head in indexer.heads]
        needed = [quality.teacher_blocks for quality in own]
        taken = [quality.blocks for quality in own]
        least = min(least, *needed, *taken)
        most = max(most, *needed, *taken)
        style = {"color": colour, "s": 24, "alpha": 0.85, "label": name, "zorder": 3}
        blocks.scatter(needed, taken, **style)
        kl.scatter([quality.kl for quality in before], [quality.kl for quality in own], **style)
    _ratio_lines(blocks)
    limits = (0.8 * least, 1.25 * most)
    blocks.set(xlim=limits, ylim=limits, xscale="log", yscale="log")
    for axis in (blocks.xaxis, blocks.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")  # powers of ten need formulas, which are off
    blocks.minorticks_off()
    blocks.set(xlabel="blocks the teacher needs", ylabel="blocks selected")
    kl.axline((0, 0), slope=1, color="#888888", linestyle=":")
    kl.set(xlabel="KL of the closed form, nats", ylabel="KL after training, nats")
    kl.set(xlim=(0, None), ylim=(0, None))
    blocks.legend(loc="upper left")
    return figure


def _ratio_lines(axes: Any) -> None:
    """As many as the teacher, and twice as many; parallel where both axes are logarithmic."""
    for ratio, style in ((1, ":"), (2, "--")):
        axes.plot(
            [0.01, 1e7], [0.01 * ratio, 1e7 * ratio], color="#888888", linestyle=style, zorder=1,
            label=f"{ratio} x", scalex=False, scaley=False,
        )  # fmt: skip
