"""Values as Grafana writes them, by unit id."""

from __future__ import annotations

import math


def written(value: float, unit: str) -> str:
    """`value` with its unit, short enough for an axis."""
    if math.isnan(value):
        return "no data"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return _seconds(value)
    if unit in ("bytes", "Bps"):
        return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB")) + ("/s" if unit == "Bps" else "")
    if unit == "reqps":
        return f"{value:.3g} req/s"
    return _scaled(value, 1000, ("", "K", "M", "G")).rstrip()


def _seconds(value: float) -> str:
    if abs(value) >= 120:
        return f"{value / 60:.3g} min"
    if abs(value) >= 1 or value == 0:
        return f"{value:.3g} s"
    return f"{1000 * value:.3g} ms"


def _scaled(value: float, base: int, names: tuple[str, ...]) -> str:
    for name in names[:-1]:
        if abs(value) < base:
            return f"{value:.3g} {name}"
        value /= base
    return f"{value:.3g} {names[-1]}"
