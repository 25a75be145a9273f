"""One panel: what it asks of Prometheus and how the answer is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["timeseries", "stat", "heatmap", "bargauge"]
COLUMNS = 24  # of Grafana's grid


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and the name of its series; `{{label}}` in it is filled in by Grafana."""

    expr: str
    legend: str = ""
    empty: str | None = None  # why a healthy server may have no data for it; None: it always has


@dataclass(frozen=True, slots=True)
class Step:
    """From `value` on, in the panel's unit, the colour is `color`; None is minus infinity."""

    value: float | None
    color: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Everything a panel needs but its place, which its board decides.

    `unit` is one of Grafana's unit ids ("s", "percentunit", "bytes", "short", "reqps", ...).
    """

    kind: Kind
    title: str
    text: str  # what it shows and what to make of it
    unit: str
    queries: tuple[Query, ...]
    width: int = 12  # of COLUMNS
    height: int = 8  # grid rows of 30 pixels and a gap
    steps: tuple[Step, ...] = ()
    stacked: bool = False
    logarithmic: bool = False
    minimum: float | None = None
    maximum: float | None = None
    words: tuple[tuple[str, str], ...] = ()  # values that are shown as a word: ("0", "down")
    colors: tuple[tuple[str, str], ...] = ()  # of series, by a regular expression of their name

    def __post_init__(self) -> None:
        assert self.queries, self.title
        assert 0 < self.width <= COLUMNS, self.title
        assert self.kind != "heatmap" or len(self.queries) == 1, self.title
        assert not (self.stacked and self.logarithmic), self.title


def good_below(warning: float, critical: float) -> tuple[Step, ...]:
    """Green, then orange from `warning` on, red from `critical` on."""
    return (Step(None, "green"), Step(warning, "orange"), Step(critical, "red"))
