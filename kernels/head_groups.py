"""Grouping of query heads by the KV head they share, so that its pages are read once."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def heads_by_row(kv_row_H: Tensor) -> Iterator[tuple[int, list[int]]]:
    """Each KV row that occurs, with the query heads that read it, in order of first occurrence."""
    rows = kv_row_H.tolist()
    for row in dict.fromkeys(rows):
        yield row, [head for head, other in enumerate(rows) if other == row]


def equal_groups(kv_row_H: Tensor) -> Iterator[tuple[list[int], list[int]]]:
    """KV rows that as many query heads read each, and those heads, row by row.

    With grouped-query attention there is one such set, or a few where head roles split a group.
    """
    by_size: dict[int, list[tuple[int, list[int]]]] = {}
    for row, heads in heads_by_row(kv_row_H):
        by_size.setdefault(len(heads), []).append((row, heads))
    for groups in by_size.values():
        yield [row for row, _ in groups], [head for _, heads in groups for head in heads]
