"""The boards as files: up to date, laid out without overlaps, readable, and found by Grafana."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import yaml

from docker.grafana.boards.board import Board, Place, placed
from docker.grafana.boards.catalogue import BOARDS, FOLDER, file_of, text_of
from docker.grafana.boards.grafana_json import SOURCE_UID
from docker.grafana.boards.panel import COLUMNS, Panel
from tests.observability.prometheus_process import ROOT

PROVISIONING = ROOT / "docker/grafana/provisioning"
UNITS = {"s", "short", "percentunit", "bytes", "reqps", "Bps"}  # Grafana's ids, as the boards use

every_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)


def contents(board: Board) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file_of(board).read_text())
    return found


@every_board
def test_the_file_is_up_to_date(board: Board) -> None:
    assert file_of(board).read_text() == text_of(board), "run: python -m docker.grafana.boards"


def test_no_file_is_left_over() -> None:
    assert set(FOLDER.iterdir()) == {file_of(board) for board in BOARDS}


def test_addresses_are_stable_and_unique() -> None:
    assert [board.uid for board in BOARDS] == [
        "rtpurbo-overview",
        "rtpurbo-token-budget",
        "rtpurbo-phases",
    ]
    for board in BOARDS:
        ids = [panel["id"] for panel in contents(board)["panels"]]
        assert len(ids) == len(set(ids))


def overlap(one: Place, other: Place) -> bool:
    return (
        one.x < other.x + other.width
        and other.x < one.x + one.width
        and one.y < other.y + other.height
        and other.y < one.y + one.height
    )


@every_board
def test_panels_neither_overlap_nor_stand_out(board: Board) -> None:
    places = [place for _, place in placed(board)]
    assert all(place.x + place.width <= COLUMNS for place in places)
    assert not any(overlap(*pair) for pair in itertools.combinations(places, 2))


@every_board
def test_lines_are_filled(board: Board) -> None:
    """No ragged right edge: the panels of a line share one height and fill the width."""
    lines: dict[int, list[Place]] = {}
    for item, place in placed(board):
        if isinstance(item, Panel):
            lines.setdefault(place.y, []).append(place)
    for places in lines.values():
        assert sum(place.width for place in places) == COLUMNS
        assert len({place.height for place in places}) == 1


@every_board
def test_every_panel_says_what_it_shows(board: Board) -> None:
    titles = [(row.title, panel.title) for row in board.rows for panel in row.panels]
    assert len(titles) == len(set(titles))
    for panel in board.panels:
        assert panel.text.endswith("."), panel.title
        assert len(panel.text) > 30, panel.title
        assert panel.unit in UNITS, panel.title
        assert panel.kind == "stat" or all(query.legend for query in panel.queries), panel.title


@every_board
def test_every_query_heeds_the_variables(board: Board) -> None:
    """Every selector of a series of ours is narrowed to the chosen models and instances."""
    for panel in board.panels:
        for query in panel.queries:
            for matchers in re.findall(r"rtpurbo_\w+\{([^}]*)\}", query.expr):
                assert 'model_name=~"$model"' in matchers, panel.title
                assert 'instance=~"$instance"' in matchers, panel.title
            assert not re.search(r"rtpurbo_\w+(?![\w{])", query.expr), panel.title


@every_board
def test_heat_maps_read_buckets(board: Board) -> None:
    for panel in contents(board)["panels"]:
        if panel["type"] == "heatmap":
            (target,) = panel["targets"]
            assert (target["format"], target["legendFormat"]) == ("heatmap", "{{le}}")
            assert re.search(r"sum by \(le\) \(increase\(rtpurbo_\w+_bucket", target["expr"])


@every_board
def test_time_range_and_variables(board: Board) -> None:
    found = contents(board)
    assert found["time"] == {"from": "now-1h", "to": "now"}
    assert found["refresh"] == "30s"
    assert [v["name"] for v in found["templating"]["list"]] == ["datasource", "model", "instance"]


def provisioned(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((PROVISIONING / name).read_text())
    return found


def test_grafana_finds_its_datasource_and_its_boards() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    (provider,) = provisioned("dashboards/rtpurbo.yaml")["providers"]
    assert mounts["./docker/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./docker/grafana/provisioning"] == "/etc/grafana/provisioning"
    (source,) = provisioned("datasources/prometheus.yaml")["datasources"]
    assert source["uid"] == SOURCE_UID
    assert source["url"] == "http://prometheus:9090"  # the service's name and port
    pace = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == pace["scrape_interval"]
