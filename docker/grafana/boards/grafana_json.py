"""Boards in Grafana's dashboard JSON, schema version 42 (Grafana 12 and 13 load it as it is)."""

from __future__ import annotations

from typing import Any

from docker.grafana.boards.board import Board, Place, Row, placed
from docker.grafana.boards.panel import Panel, Query, Step
from docker.grafana.boards.promql import series

Json = dict[str, Any]

SCHEMA_VERSION = 42
SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
SOURCE_UID = "rtpurbo-prometheus"  # as provisioned; a reader elsewhere picks another one
TAG = "rtpurbo"
RESTARTED = f"increase({series('engine_restarts_total')}[$__interval]) > 0"
LABELS_OF = "rtpurbo_engine_up"  # the series whose labels the variables offer


def dashboard(board: Board) -> Json:
    """The whole file of a board."""
    panels = [
        _heading(number, item, place)
        if isinstance(item, Row)
        else {"id": number, "gridPos": _grid(place), **_panel(item)}
        for number, (item, place) in enumerate(placed(board), start=1)
    ]
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.text,
        "tags": [TAG],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,  # saving is not: provisioned boards are changed in their code
        "graphTooltip": 1,  # one crosshair over all panels
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [_links_to_the_others()],
        "annotations": {"list": [_restarts()]},
        "templating": {"list": [_source(), _choice("model", "model_name"), _choice("instance")]},
        "panels": panels,
    }


def _links_to_the_others() -> Json:
    return {
        "type": "dashboards", "title": "Boards", "tags": [TAG], "asDropdown": False,
        "includeVars": True, "keepTime": True, "targetBlank": False, "icon": "", "tooltip": "",
        "url": "",
    }  # fmt: skip


def _restarts() -> Json:
    """A vertical line over every panel where an engine was started again."""
    return {
        "name": "Engine restarts", "datasource": SOURCE, "enable": True, "iconColor": "red",
        "target": {"refId": "Anno", "expr": RESTARTED},
        "titleFormat": "Engine restarted", "textFormat": "{{instance}}",
    }  # fmt: skip


def _source() -> Json:
    return {
        "name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus",
        "current": {"text": "Prometheus", "value": SOURCE_UID}, "hide": 0, "refresh": 1,
    }  # fmt: skip


def _choice(name: str, label: str | None = None) -> Json:
    """A variable with the values of a label; `All` matches everything, also what comes later."""
    query = f"label_values({LABELS_OF}, {label or name})"
    return {
        "name": name, "label": name.capitalize(), "type": "query", "datasource": SOURCE,
        "query": {"qryType": 1, "query": query, "refId": name}, "definition": query,
        "includeAll": True, "allValue": ".*", "multi": True, "refresh": 2, "sort": 1, "hide": 0,
        "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def _grid(place: Place) -> Json:
    return {"x": place.x, "y": place.y, "w": place.width, "h": place.height}


def _heading(number: int, row: Row, place: Place) -> Json:
    return {
        "id": number, "type": "row", "title": row.title, "collapsed": False,
        "gridPos": _grid(place), "panels": [],
    }  # fmt: skip


def _panel(panel: Panel) -> Json:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "targets": [
            _target(panel, query, chr(ord("A") + i)) for i, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _field(panel), "overrides": _colors(panel)},
        "options": _options(panel),
    }


def _target(panel: Panel, query: Query, letter: str) -> Json:
    heat = panel.kind == "heatmap"
    return {
        "refId": letter,
        "datasource": SOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend,
        "format": "heatmap" if heat else "time_series",
        "range": True,
        "instant": False,
        "exemplar": "_bucket" in query.expr and not heat,
    }


def _field(panel: Panel) -> Json:
    """Unit, limits and colours; what is None is left to Grafana."""
    steps = panel.steps or (Step(None, "green"),)
    found: Json = {
        "unit": panel.unit,
        "min": panel.minimum,
        "max": panel.maximum,
        "thresholds": {
            "mode": "absolute",
            "steps": [{"value": step.value, "color": step.color} for step in steps],
        },
        "mappings": _words(panel),
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "custom": _drawing(panel),
    }
    return {key: value for key, value in found.items() if value not in (None, [], {})}


def _colors(panel: Panel) -> list[Json]:
    """The same colour for the same series, whatever else is in the panel."""
    return [
        {
            "matcher": {"id": "byRegexp", "options": f"/^({name})$/"},
            "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": color}}],
        }
        for name, color in panel.colors
    ]


def _words(panel: Panel) -> list[Json]:
    if not panel.words:
        return []
    options = {value: {"text": word, "index": i} for i, (value, word) in enumerate(panel.words)}
    return [{"type": "value", "options": options}]


def _drawing(panel: Panel) -> Json:
    """How lines are drawn; other kinds have nothing of the sort."""
    if panel.kind != "timeseries":
        return {}
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 40 if panel.stacked else 8,
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10}
        if panel.logarithmic
        else {"type": "linear"},
        "thresholdsStyle": {"mode": "dashed" if panel.steps else "off"},
    }


def _options(panel: Panel) -> Json:
    reduced = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    if panel.kind == "stat":
        return {
            "reduceOptions": reduced, "graphMode": "area", "colorMode": "value",
            "justifyMode": "auto", "textMode": "value", "orientation": "auto", "wideLayout": True,
            "showPercentChange": False, "percentChangeColorMode": "standard",
        }  # fmt: skip
    if panel.kind == "bargauge":
        return {
            "reduceOptions": reduced, "displayMode": "basic", "orientation": "horizontal",
            "valueMode": "color", "namePlacement": "left", "showUnfilled": True, "sizing": "auto",
            "minVizHeight": 12, "minVizWidth": 8, "maxVizHeight": 40,
            "legend": {
                "showLegend": False, "displayMode": "list", "placement": "bottom", "calcs": [],
            },
        }  # fmt: skip
    if panel.kind == "heatmap":
        return _heat_options(panel)
    return {
        "legend": {
            "showLegend": True, "displayMode": "table", "placement": "right",
            "calcs": ["lastNotNull", "max"],
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }  # fmt: skip


def _heat_options(panel: Panel) -> Json:
    return {
        "calculate": False,
        "cellGap": 1,
        "color": {
            "mode": "scheme", "scheme": "Oranges", "scale": "exponential", "exponent": 0.5,
            "steps": 64, "reverse": False, "fill": "dark-orange",
        },
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-9},  # empty cells stay transparent
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "yHistogram": True, "showColorScale": True},
        "yAxis": {"axisPlacement": "left", "unit": panel.unit},
    }  # fmt: skip
