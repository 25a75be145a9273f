"""Draws docs/img/board-*.png from real data: `python -m tests.observability.pictures`.

Serves the embedded model under a mixed load for some minutes, with a real Prometheus beside it, and
draws what the boards' queries return. The pictures are matplotlib's, not Grafana's.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import httpx

from benchmarks.server_process import serving
from docker.grafana.boards.board import Board
from docker.grafana.boards.catalogue import BOARDS
from engine.embedded import embedded_model_path
from tests.observability.answers import Answers
from tests.observability.mixed_load import MixedLoad
from tests.observability.prometheus_process import ROOT, scraping
from tests.observability.rendering import draw_board

FOLDER = ROOT / "docs/img"
KEY = "a-key-of-these-pictures"
SHOWN = {  # rows that are worth a picture, and how many of their panels
    "rtpurbo-overview": {"Is it well?": 16, "Traffic": 4, "Latency": 4},
    "rtpurbo-token-budget": {
        "At a glance": 6, "What retrieval heads attend": 6, "What decoding reads": 4,
    },
    "rtpurbo-phases": {"Now": 6, "Where the time goes": 8},
}  # fmt: skip


def pictured(board: Board) -> Board:
    """A board with that part of it that is drawn."""
    shown = SHOWN[board.uid]
    rows = [replace(r, panels=r.panels[: shown[r.title]]) for r in board.rows if r.title in shown]
    return replace(board, rows=tuple(rows))


def record(minutes: float, clients: int) -> Answers:
    """Run the load, and ask everything that the boards ask."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key_file = folder / "api_key"
        key_file.write_text(f"{KEY}\n")
        flags = (
            "--api-key-file",
            str(key_file),
            "--max-num-seqs",
            "4",
            "--max-batch-tokens",
            "512",
        )
        with (
            serving(str(embedded_model_path()), *flags) as server,
            scraping(folder, httpx.URL(server.url).port or 0, key_file) as prometheus,
        ):
            start = time.time()
            asyncio.run(MixedLoad(server.url, KEY, clients).run(60 * minutes))
            return Answers.asked(prometheus, BOARDS, start, time.time())


def main() -> None:
    """Draw every board."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="length of the load")
    parser.add_argument("--clients", type=int, default=6, help="most requests at a time")
    parser.add_argument("--answers", type=Path, help="kept here; drawn again if it is there")
    given = parser.parse_args()
    if given.answers is not None and given.answers.exists():
        answers = Answers.kept(given.answers)
    else:
        answers = record(given.minutes, given.clients)
        if given.answers is not None:
            answers.keep(given.answers)
    FOLDER.mkdir(exist_ok=True)
    for board in BOARDS:
        path = FOLDER / f"{board.uid.replace('rtpurbo-', 'board-')}.png"
        draw_board(pictured(board), answers, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
