"""Writes `docker/grafana/dashboards/*.json`; a test fails while they are not up to date."""

from __future__ import annotations

from docker.grafana.boards.catalogue import BOARDS, FOLDER, file_of, text_of


def main() -> None:
    """Write every board."""
    FOLDER.mkdir(exist_ok=True)
    for board in BOARDS:
        file_of(board).write_text(text_of(board), encoding="utf-8")
        print(f"{file_of(board).relative_to(FOLDER.parents[2])}: {len(board.panels)} panels")


if __name__ == "__main__":
    main()
