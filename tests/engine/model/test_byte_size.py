"""Byte counts read well at every size."""

from __future__ import annotations

import pytest

from engine.model.byte_size import shown_bytes


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1,000 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (123_456_789, "118 MiB"),
        (1000 * 2**20, "1,000 MiB"),
        (2**30 - 1, "1 GiB"),
        (80 * 2**30, "80 GiB"),
        (1536 * 2**30, "1,536 GiB"),
    ],
)
def test_sizes_are_written_without_exponents(count: int, shown: str) -> None:
    """1000 MiB was once 1e+03 MiB."""
    assert shown_bytes(count) == shown
