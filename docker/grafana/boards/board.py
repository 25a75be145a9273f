"""A board: rows of panels, and where each of them stands in Grafana's grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from docker.grafana.boards.panel import COLUMNS, Panel


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and the panels under it, laid out from left to right."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One dashboard; `uid` is its address in Grafana and never changes."""

    uid: str
    title: str
    text: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels in reading order."""
        return tuple(panel for row in self.rows for panel in row.panels)


@dataclass(frozen=True, slots=True)
class Place:
    """A rectangle of the grid: left edge, upper edge, width, height."""

    x: int
    y: int
    width: int
    height: int


def placed(board: Board) -> Iterator[tuple[Row | Panel, Place]]:
    """Every heading and panel with its place; a line breaks where a panel does not fit any more."""
    top = 0
    for row in board.rows:
        yield row, Place(0, top, COLUMNS, 1)
        top += 1
        left = tallest = 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                top, left, tallest = top + tallest, 0, 0
            yield panel, Place(left, top, panel.width, panel.height)
            left, tallest = left + panel.width, max(tallest, panel.height)
        top += tallest
