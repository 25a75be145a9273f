"""Byte counts for people."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB")


def shown_bytes(count: float) -> str:
    """At least 3 significant digits in powers of 1024: 16.9 MiB, 1,010 KiB, 1,536 GiB."""
    value, unit = float(count), 0
    while value >= 1023.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"
    return f"{digits} {_UNITS[unit]}"
