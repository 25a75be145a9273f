"""The same work on many texts at once, where nearly all of it is the tokenizer's. Torch-free.

The tokenizer works outside of Python's lock, so threads are enough; beside a GPU one thread of it
takes longer than a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def side_by_side(make: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
    """What `make` gives for each item, in their order; raises what the first to fail raises."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(make, items))
