"""Cutting the rows of a batch into parts whose gathered pages fit a bound."""

from __future__ import annotations


def row_slices(blocks_R: list[int], elements_per_block: int, limit: int) -> list[slice]:
    """Consecutive rows, padded to their longest; each part gathers at most `limit` elements."""
    slices: list[slice] = []
    start, widest = 0, 0
    for row, blocks in enumerate(blocks_R):
        grown = max(widest, blocks)
        if row > start and (row + 1 - start) * grown * elements_per_block > limit:
            slices.append(slice(start, row))
            start, grown = row, blocks
        widest = grown
    slices.append(slice(start, len(blocks_R)))
    return slices
