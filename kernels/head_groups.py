"""Grouping of query heads by the KV head they share, so that its pages are read once."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def heads_by_row(kv_row_H: Tensor) -> Iterator[tuple[int, list[int]]]:
    """Each KV row that occurs, with the query heads that read it, in order of first occurrence."""
    rows = kv_row_H.tolist()
    for row in dict.fromkeys(rows):
        yield row, [head for head, other in enumerate(rows) if other == row]
