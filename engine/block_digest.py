"""Names of page contents: SHA-256 over the tokens of a block, chained from the block before it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256

_ROOT = sha256(b"rtpurbo prefix v1").digest()


def extend_digests(digests: list[bytes], tokens: Sequence[int], block_tokens: int) -> None:
    """Append the digests of the full blocks of `tokens` that `digests` does not cover yet.

    A digest stands for all tokens up to the end of its block, so equal digests mean equal prefixes.
    """
    parent = digests[-1] if digests else _ROOT
    first = len(digests) * block_tokens
    last = len(tokens) // block_tokens * block_tokens
    ids = array("i", tokens[first:last]).tobytes()
    size = block_tokens * array("i").itemsize
    for start in range(0, len(ids), size):
        parent = sha256(parent + ids[start : start + size]).digest()
        digests.append(parent)
