"""Every panel and every rule, asked of a real Prometheus that scrapes a real server under load."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.server_process import serving
from docker.grafana.boards.catalogue import BOARDS
from docker.grafana.boards.grafana_json import LABELS_OF, RESTARTED
from docker.grafana.boards.panel import Query
from engine.embedded import embedded_model_path
from tests.debian_tools import tool
from tests.observability.grafana_variables import filled_in
from tests.observability.light_load import LightLoad
from tests.observability.prometheus_process import ROOT, Prometheus, promtool, scraping

pytestmark = pytest.mark.timeout(400)

KEY = "a-key-of-this-test"
SCRAPES = 'count_over_time(up{job="rtpurbo"}[1h])'
RULES = yaml.safe_load((ROOT / "docker/prometheus/rules.yml").read_text())["groups"]
RECORDED = [rule for group in RULES for rule in group["rules"] if "record" in rule]
ASKED = [
    *(rule["expr"] for group in RULES for rule in group["rules"]),
    *(query.expr for board in BOARDS for panel in board.panels for query in panel.queries),
]
QUERIES = [
    pytest.param(query, id=f"{board.uid}/{panel.title}/{query.legend}")
    for board in BOARDS
    for panel in board.panels
    for query in panel.queries
]


@dataclass(frozen=True, slots=True)
class Observed:
    """A server that was under load from `start` to `end` (seconds of the epoch)."""

    prometheus: Prometheus
    page: str
    start: float
    end: float

    def values(self, expr: str) -> list[float]:
        """Every value of every series while the load ran, without NaN."""
        series = self.prometheus.query_range(expr, self.start, self.end, step=1)
        found = [float(value) for one in series for _, value in one["values"]]
        return [value for value in found if not math.isnan(value)]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    tool("prometheus")  # skipped before a server is started
    folder = tmp_path_factory.mktemp("prometheus")
    key_file = folder / "api_key"
    key_file.write_text(f"{KEY}\n")
    flags = ("--api-key-file", str(key_file), "--max-num-seqs", "8", "--threads", "1")
    with (
        serving(str(embedded_model_path()), *flags) as server,
        scraping(folder, httpx.URL(server.url).port or 0, key_file) as prometheus,
    ):
        start = time.time()
        load = LightLoad(server.url, KEY)
        wait_until(prometheus, SCRAPES, 1)  # it may find its target seconds after it is ready
        for _ in range(2):  # a series that comes with its first event shows growth from the next on
            load.run()
            wait_for_scrapes(prometheus)
        page = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
        yield Observed(prometheus, page.text, start, time.time())


def wait_for_scrapes(prometheus: Prometheus) -> None:
    """Until what is now was scraped, and rules were evaluated on it.

    The server renders a page at most once a second, so the next scrape may find one of before.
    """
    wait_until(prometheus, SCRAPES, newest(prometheus, SCRAPES) + 3)
    wait_until(prometheus, f"timestamp({RECORDED[-1]['record']})", time.time())  # last of its group


def newest(prometheus: Prometheus, expr: str) -> float:
    found = prometheus.query(expr)
    return float(found[0]["value"][1]) if found else 0.0


def wait_until(prometheus: Prometheus, expr: str, value: float) -> None:
    deadline = time.monotonic() + 100
    while newest(prometheus, expr) < value:
        assert time.monotonic() < deadline, f"{expr} stays under {value}"
        time.sleep(0.3)


def test_the_scrape_is_authorised_and_fast(observed: Observed) -> None:
    assert set(observed.values('up{job="rtpurbo"}')[-2:]) == {1.0}
    (target,) = [
        target
        for target in observed.prometheus.api("targets")["activeTargets"]
        if target["labels"]["job"] == "rtpurbo"
    ]
    assert target["health"] == "up", target["lastError"]


def test_the_page_is_clean(observed: Observed) -> None:
    done = promtool("check", "metrics", stdin=observed.page)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("query", QUERIES)
def test_every_panel_has_data(observed: Observed, query: Query) -> None:
    values = observed.values(filled_in(query.expr))
    assert values or query.empty, "no data, and the panel does not say why there may be none"
    assert all(math.isfinite(value) for value in values)


@pytest.mark.parametrize("label", ["model_name", "instance"])
def test_every_variable_has_a_choice(observed: Observed, label: str) -> None:
    assert observed.prometheus.api(f"label/{label}/values", **{"match[]": LABELS_OF})


def test_restarts_can_be_marked(observed: Observed) -> None:
    """There was none, so nothing comes back; a mistake in the query would raise."""
    assert observed.values(filled_in(RESTARTED)) == []


def test_slow_requests_are_linked_to_their_log_lines(observed: Observed) -> None:
    found = observed.prometheus.api(
        "query_exemplars",
        query="rtpurbo_time_to_first_token_seconds_bucket",
        start=observed.start,
        end=observed.end,
    )
    labels = [exemplar["labels"] for one in found for exemplar in one["exemplars"]]
    assert labels
    assert all(set(each) == {"request_id"} for each in labels)


@pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: rule["record"])
def test_every_recorded_series_has_data(observed: Observed, rule: dict[str, Any]) -> None:
    assert observed.values(rule["record"])
    assert observed.values(rule["expr"])


def test_whatever_is_asked_for_exists(observed: Observed) -> None:
    """Alerts of a healthy server are empty, as are alerts about a series that was renamed."""
    recorded = {f":{rule['record'].split(':')[1]}" for rule in RECORDED}
    asked = {name for text in ASKED for name in re.findall(r":?\brtpurbo_\w+", text)} - recorded
    assert len(asked) > 40
    served = set(re.findall(r"^(rtpurbo_\w+)[{ ]", observed.page, re.MULTILINE))
    assert asked - served == set()


def test_no_rule_fails_and_no_alert_fires(observed: Observed) -> None:
    rules = [r for g in observed.prometheus.api("rules")["groups"] for r in g["rules"]]
    assert len(rules) == sum(len(group["rules"]) for group in RULES)
    assert [rule["name"] for rule in rules if rule["health"] == "err"] == []
    firing = [rule["name"] for rule in rules if rule.get("state") == "firing"]
    assert firing == []


def test_the_load_was_seen_as_what_it_was(observed: Observed) -> None:
    """Counts of two rounds, by way of Prometheus; so a panel can't pass on a series of zeros."""

    def count(expr: str) -> float:
        (found,) = observed.prometheus.query(f"sum({expr})", observed.end)
        return float(found["value"][1])

    assert count('rtpurbo_requests_finished_total{reason="length"}') == 2 * 4
    assert count('rtpurbo_requests_finished_total{reason="abort"}') == 2
    assert count("rtpurbo_requests_rejected_total") == 2
    assert count("rtpurbo_attended_fraction_count") >= 2
    assert 0 < count("rtpurbo_attended_fraction_sum") / count("rtpurbo_attended_fraction_count") < 1
