"""What draws the pictures of the boards: units, and a board from answers that were made up."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from docker.grafana.boards.catalogue import BOARDS
from docker.grafana.boards.panel import Panel
from docker.grafana.boards.token_budget import TOKEN_BUDGET
from tests.observability.answers import Answers
from tests.observability.pictures import FOLDER, SHOWN, pictured
from tests.observability.prometheus_process import ROOT
from tests.observability.rendering import draw_board
from tests.observability.units import written


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0125, "s", "12.5 ms"),
        (90.0, "s", "90 s"),
        (600.0, "s", "10 min"),
        (0.4321, "percentunit", "43.2 %"),
        (1536.0, "bytes", "1.5 KiB"),
        (3 * 2.0**20, "Bps", "3 MiB/s"),
        (12_345.0, "short", "12.3 K"),
        (7.0, "short", "7"),
        (0.25, "reqps", "0.25 req/s"),
        (math.nan, "s", "no data"),
    ],
)
def test_units(value: float, unit: str, text: str) -> None:
    assert written(value, unit) == text


def made_up(panel: Panel) -> list[dict[str, object]]:
    """One series, or buckets that fill up from the second one on."""
    if panel.kind != "heatmap":
        labels = dict.fromkeys(re.findall(r"{{(\w+)}}", panel.queries[0].legend), "x")
        return [{"metric": labels, "values": [[float(t), str(t / 60)] for t in range(0, 60, 3)]}]
    return [
        {"metric": {"le": edge}, "values": [[float(t), str(t * i)] for t in range(0, 60, 3)]}
        for i, edge in enumerate(("0.1", "1.0", "+Inf"))
    ]


def test_a_board_of_all_kinds_of_panels_can_be_drawn(tmp_path: Path) -> None:
    shown = pictured(TOKEN_BUDGET)
    assert {panel.kind for panel in shown.panels} == {"stat", "timeseries", "heatmap", "bargauge"}
    series = {q.expr: made_up(panel) for panel in shown.panels for q in panel.queries}
    draw_board(shown, Answers(0.0, 1.0, 3.0, series), tmp_path / "board.png")
    assert (tmp_path / "board.png").read_bytes().startswith(b"\x89PNG")


def test_panels_that_are_drawn_exist() -> None:
    for board in BOARDS:
        found = {row.title: len(row.panels) for row in pictured(board).rows}
        assert found == SHOWN[board.uid]


def test_pictures_are_small_and_shown() -> None:
    readme = (ROOT / "README.md").read_text()
    pictures = sorted(FOLDER.glob("board-*.png"))
    assert len(pictures) == len(BOARDS)
    for picture in pictures:
        assert picture.stat().st_size < 200 * 1024, picture.name
        assert f"docs/img/{picture.name}" in readme
