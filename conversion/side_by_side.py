"""The same work on many texts at once, where nearly all of it is the tokenizer's. Torch-free.

The tokenizer works outside of Python's lock, so threads are enough; beside a GPU one thread of it
takes longer than a small model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

AHEAD = 8  # items under way before the first of them is asked for


def side_by_side(make: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
    """What `make` gives for each item, in their order; raises what the first to fail raises."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(make, items))


def ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """The same one by one, for items without end too: while one is used the next are made."""
    with ThreadPoolExecutor(AHEAD) as pool:
        made: deque[Future[Made]] = deque()
        for item in items:
            made.append(pool.submit(make, item))
            if len(made) > AHEAD:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()
