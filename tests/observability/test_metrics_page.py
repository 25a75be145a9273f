"""docs/metrics.md tells of every metric that a server has, and of no other."""

from __future__ import annotations

import pytest
from prometheus_client import Metric

from tests.observability.metrics_page import PAGE, observed_families, text_of


@pytest.fixture(scope="module")
def families() -> list[Metric]:
    return observed_families()


def test_the_page_is_up_to_date(families: list[Metric]) -> None:
    assert PAGE.read_text() == text_of(families), "run: python -m tests.observability.metrics_page"


def test_every_metric_was_observed(families: list[Metric]) -> None:
    """One without a sample would stand in the page without its labels and buckets."""
    assert [family.name for family in families if not family.samples] == []
