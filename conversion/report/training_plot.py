"""Losses of both training stages and the validation gap; needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from conversion.report.facts import DistilFacts, IndexerFacts

LOSS, SMOOTH, GAP, AGREEMENT = "#b8c4d0", "#0072b2", "#d55e00", "#009e73"
SMOOTH_STEPS = 25  # a mean over as many is drawn as well, where there are more


def training_figure(indexer: IndexerFacts | None, distil: DistilFacts | None) -> Any:
    """A panel per curve there is: fit, distillation, agreement. At least one must be there."""
    from matplotlib.figure import Figure

    panels: list[Callable[[Any], None]] = []
    if indexer is not None and indexer.losses:
        losses = indexer.losses
        panels.append(lambda axes: _fit_panel(axes, losses))
    if distil is not None and distil.losses:
        panels.append(lambda axes: _distil_panel(axes, distil))
    if distil is not None and distil.validations:
        panels.append(lambda axes: _agreement_panel(axes, distil))
    assert panels
    figure = Figure(figsize=(max(5.0, 4.0 * len(panels)), 3.4), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _fit_panel(axes: Any, losses: Sequence[float]) -> None:
    _losses(axes, losses)
    axes.set(title="fit of the indexer", ylabel="KL, nats per query")


def _distil_panel(axes: Any, distil: DistilFacts) -> None:
    _losses(axes, distil.losses)
    steps = [gap.step for gap in distil.validations]
    gaps = [gap.kl for gap in distil.validations]
    axes.plot(steps, gaps, marker="o", color=GAP, label="held out")
    axes.axvline(distil.best.step, color="#888888", linestyle=":", label="kept")
    axes.set(title="distillation", ylabel="KL, nats per response token")
    axes.legend()


def _agreement_panel(axes: Any, distil: DistilFacts) -> None:
    steps = [gap.step for gap in distil.validations]
    agreements = [gap.agreement for gap in distil.validations]
    axes.plot(steps, agreements, marker="o", color=AGREEMENT)
    axes.axvline(distil.best.step, color="#888888", linestyle=":")
    axes.set(title="held out: same best guess", ylabel="share of response tokens")


def _losses(axes: Any, losses: Sequence[float]) -> None:
    steps = range(1, len(losses) + 1)
    if len(losses) <= 2 * SMOOTH_STEPS:
        axes.plot(steps, losses, color=SMOOTH, marker=".", label="training")
        return
    axes.plot(steps, losses, color=LOSS, linewidth=0.8, label="training")
    means = [
        sum(losses[stop - SMOOTH_STEPS : stop]) / SMOOTH_STEPS
        for stop in range(SMOOTH_STEPS, len(losses) + 1)
    ]
    name = f"mean of {SMOOTH_STEPS} steps"
    axes.plot(steps[SMOOTH_STEPS - 1 :], means, color=SMOOTH, linewidth=1.8, label=name)
    axes.legend()
