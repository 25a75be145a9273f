"""Recording and alert rules: valid, unit-tested, and each alert with a page in the runbook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.observability.prometheus_process import ROOT, promtool

FOLDER = ROOT / "docker/prometheus"
GROUPS = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
UNIT_TESTS = ROOT / "tests/observability/rules_test.yml"


def test_promtool_accepts_the_rules() -> None:
    done = promtool("check", "rules", FOLDER / "rules.yml")
    assert done.returncode == 0, done.stderr
    assert f"{sum(len(group['rules']) for group in GROUPS)} rules found" in done.stdout


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    text = (FOLDER / "prometheus.yml").read_text()
    key = tmp_path / "api_key"
    key.write_text("key\n")
    (tmp_path / "rules.yml").write_text((FOLDER / "rules.yml").read_text())
    (tmp_path / "prometheus.yml").write_text(text.replace("/run/secrets/api_key", str(key)))
    done = promtool("check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_do_what_their_unit_tests_say() -> None:
    done = promtool("test", "rules", UNIT_TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_seen_both_quiet_and_firing() -> None:
    seen = [test for case in yaml.safe_load(UNIT_TESTS.read_text())["tests"]
            for test in case.get("alert_rule_test", [])]  # fmt: skip
    names = {alert["alert"] for alert in ALERTS}
    assert {test["alertname"] for test in seen if test.get("exp_alerts")} == names
    assert {test["alertname"] for test in seen if not test.get("exp_alerts")} == names


def anchors() -> set[str]:
    """Where a link into the runbook may point, as GitHub derives it from the headings."""
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    return {heading.lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    page, anchor = alert["annotations"]["runbook"].split("#")
    assert page == "docs/runbook.md"
    assert anchor in anchors()
    section = (ROOT / page).read_text().lower().split(f"## {anchor.replace('-', ' ')}\n")[1]
    assert alert["alert"].lower() in section.split("\n## ")[0]


def test_no_section_of_the_runbook_is_an_orphan() -> None:
    used = {alert["annotations"]["runbook"].split("#")[1] for alert in ALERTS}
    assert used == anchors()
