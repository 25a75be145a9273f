"""Names of page contents: SHA-256 over the tokens of a block, chained from the block before it."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from hashlib import sha256

_ROOT = sha256(b"rtpurbo prefix v1").digest()


def extend_digests(digests: list[bytes], tokens: Sequence[int], block_tokens: int) -> None:
    """Append the digests of the full blocks of `tokens`, which begin where `digests` end.

    A digest stands for all tokens up to the end of its block, so equal digests mean equal prefixes.
    """
    parent = digests[-1] if digests else _ROOT
    ids = array("i", tokens[: len(tokens) // block_tokens * block_tokens]).tobytes()
    size = block_tokens * array("i").itemsize
    for start in range(0, len(ids), size):
        parent = sha256(parent + ids[start : start + size]).digest()
        digests.append(parent)


def common_blocks(first: Sequence[bytes], second: Sequence[bytes]) -> int:
    """How many leading blocks two sequences share: a bisection, because digests are chained."""
    blocks = range(min(len(first), len(second)))
    return bisect_left(blocks, True, key=lambda block: first[block] != second[block])
