"""What Grafana fills into a query before it asks Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

EVERYTHING = {"$model": ".*", "$instance": ".*", "$__rate_interval": "1m", "$__interval": "15s"}


def filled_in(expr: str, variables: Mapping[str, str] = EVERYTHING) -> str:
    """The expression as Prometheus gets it.

    Raises:
        AssertionError: a variable is left.
    """
    for name, value in variables.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, expr
    return expr
