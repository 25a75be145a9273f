"""Caches of more than 2^31 elements without the memory: pages that nobody touches take none."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

from kernels.decode_inputs import PagedPool

PAST_INT32 = 2**31  # elements
_NO_RESERVE = 0x4000  # Linux: untouched pages are not counted


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in memory that is made when it is written; OSError where that is refused."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def pages_past_int32(cache: Tensor) -> int:
    """How many pages of this layout it takes until elements are past int32's reach."""
    return -(-PAST_INT32 // prod(cache.shape[1:]))


def moved(cache: Tensor, by: int) -> Tensor:
    """The cache with every page `by` pages further on."""
    grown = untouched((by + len(cache), *cache.shape[1:]), cache.dtype)
    grown[by:] = cache
    return grown


def moved_pool(pool: PagedPool, by: int) -> PagedPool:
    return PagedPool(moved(pool.k_cache, by), moved(pool.v_cache, by), pool.tables_RB + by)
