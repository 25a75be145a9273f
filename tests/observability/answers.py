"""What Prometheus answered to every query of the boards, kept so that it can be drawn again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from docker.grafana.boards.board import Board
from tests.observability.grafana_variables import EVERYTHING, filled_in
from tests.observability.prometheus_process import Prometheus


@dataclass(frozen=True, slots=True)
class Answers:
    """Series by expression; from `start`, seconds of the epoch, a value every `step` seconds."""

    start: float
    minutes: float
    step: float
    series: dict[str, list[dict[str, Any]]]

    @classmethod
    def asked(
        cls, prometheus: Prometheus, boards: Iterable[Board], start: float, end: float
    ) -> Answers:
        """Ask everything, with rates over half a minute."""
        step, variables = 3.0, {**EVERYTHING, "$__rate_interval": "30s"}
        panels = [panel for board in boards for panel in board.panels]
        expressions = {query.expr for panel in panels for query in panel.queries}
        series = {
            expr: prometheus.query_range(filled_in(expr, variables), start, end, step)
            for expr in expressions
        }
        return cls(start, (end - start) / 60, step, series)

    @classmethod
    def kept(cls, path: Path) -> Answers:
        """Read back what `keep` wrote."""
        return cls(**json.loads(path.read_text()))

    def keep(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))
