"""Writes docs/metrics.md from a running server: `python -m tests.observability.metrics_page`.

The server is a real one around an engine in memory. A test fails while the file is not up to date.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.observability.prometheus_process import ROOT
from tests.server.live_server import LiveServer, live_server

PAGE = ROOT / "docs/metrics.md"
IMPLIED = {"model_name", "le"}  # labels of every series, and of every bucket
UNITS = ("seconds", "bytes", "ratio", "fraction", "tokens")

HEAD = """# Metrics

What `GET /metrics` answers, in Prometheus' text format or, if asked for, as OpenMetrics with
exemplars. Every series of ours has the label `model_name`; no label takes a value that a
client chose. This page is written by `python -m tests.observability.metrics_page`
(`make docs`) from a running server.

Readers of these series: the boards in [docker/grafana](../docker/grafana), and the alerts in
[docker/prometheus/rules.yml](../docker/prometheus/rules.yml) with their [runbook](runbook.md).

| metric | type | labels | unit | what |
|---|---|---|---|---|
"""

BUCKETS = """
## Buckets

Upper edges of the histograms' buckets; the last one is open.

| histogram | edges |
|---|---|
"""


def text_of(families: Iterable[Metric]) -> str:
    """The whole page."""
    told = [family for family in families if not family.name.endswith("_created")]
    found = sorted(told, key=lambda family: family.name)
    rows = [_row(family) for family in found]
    buckets = [_edges(family) for family in found if family.type == "histogram"]
    return HEAD + "".join(rows) + BUCKETS + "".join(buckets)


def observed_families() -> list[Metric]:
    """Everything that a server has to tell after requests of every kind."""
    with tempfile.TemporaryDirectory() as folder, live_server(Path(folder) / "model") as server:
        _ask(server)
        return list(text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text))


def _ask(server: LiveServer) -> None:
    assert server.post(prompt="import os\n", max_tokens=4, unheard_of=1).status_code == 200
    assert server.post(prompt="import os\n", max_tokens=4, stream=True).status_code == 200
    assert server.post(prompt="import os\n", max_tokens=-1).status_code == 400


def _row(family: Metric) -> str:
    name = family.name + ("_total" if family.type == "counter" else "")
    labels = sorted({label for sample in family.samples for label in sample.labels} - IMPLIED)
    unit = next((unit for unit in UNITS if unit in family.name.split("_")), "")
    words = [f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), unit]
    return f"| {' | '.join([*words, family.documentation])} |\n"


def _edges(family: Metric) -> str:
    edges = {float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels}
    finite = sorted(edges - {float("inf")})
    return f"| `{family.name}` | {' '.join(f'{edge:g}' for edge in finite)} |\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(text_of(observed_families()), encoding="utf-8")


if __name__ == "__main__":
    main()
