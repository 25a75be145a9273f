"""All boards, and the files that Grafana reads them from."""

from __future__ import annotations

import json
from pathlib import Path

from docker.grafana.boards.board import Board
from docker.grafana.boards.grafana_json import dashboard
from docker.grafana.boards.overview import OVERVIEW
from docker.grafana.boards.phases import PHASES
from docker.grafana.boards.token_budget import TOKEN_BUDGET

BOARDS = (OVERVIEW, TOKEN_BUDGET, PHASES)
FOLDER = Path(__file__).resolve().parents[1] / "dashboards"


def file_of(board: Board) -> Path:
    """Where a board's JSON stands."""
    return FOLDER / f"{board.uid}.json"


def text_of(board: Board) -> str:
    """What stands in it."""
    return json.dumps(dashboard(board), indent=2, ensure_ascii=False) + "\n"
