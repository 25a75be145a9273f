"""Metric families with the labels that every series of a server carries."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)

Values = Mapping[tuple[str, ...], float]  # by label values


class Families:
    """Makes families of one model; names are given without the prefix."""

    def __init__(self, model_name: str) -> None:
        self._model = model_name

    def gauge(self, name: str, text: str, value: float) -> Metric:
        return self.gauges(name, text, (), {(): value})

    def gauges(self, name: str, text: str, labels: tuple[str, ...], values: Values) -> Metric:
        family = GaugeMetricFamily(f"rtpurbo_{name}", text, labels=("model_name", *labels))
        for label_values, value in values.items():
            family.add_metric((self._model, *label_values), float(value))
        return family

    def counter(self, name: str, text: str, value: float) -> Metric:
        return self.counters(name, text, (), {(): value})

    def counters(self, name: str, text: str, labels: tuple[str, ...], values: Values) -> Metric:
        """`name` without `_total`, which the exposition adds."""
        family = CounterMetricFamily(f"rtpurbo_{name}", text, labels=("model_name", *labels))
        for label_values, value in values.items():
            family.add_metric((self._model, *label_values), float(value))
        return family

    def summary(self, name: str, text: str, count: int, total: float) -> Metric:
        """Count and sum of observations, without quantiles."""
        family = SummaryMetricFamily(f"rtpurbo_{name}", text, labels=("model_name",))
        family.add_metric((self._model,), count, total)
        return family

    def info(self, name: str, text: str, facts: Mapping[str, str]) -> Metric:
        """A series of value 1 whose labels are facts; `name` without `_info`."""
        family = InfoMetricFamily(f"rtpurbo_{name}", text, labels=("model_name",))
        family.add_metric((self._model,), dict(facts))
        return family
