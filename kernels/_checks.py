"""Layout checks at the doors of the ops: once per call, by name, and never again inside."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def check_shapes(sizes: dict[str, int], **tensors: tuple[Tensor, str]) -> None:
    """Compare each tensor's shape with its dimension names, for example `(q, "R H D")`.

    `sizes` binds names beforehand; a name that is new takes the size it meets first.

    Raises:
        ValueError: names the tensor, the dimension and both sizes.
    """
    for name, (tensor, dims) in tensors.items():
        names = _names(dims)
        if tensor.dim() != len(names):
            raise ValueError(f"{name} must be [{dims}], got {tensor.dim()} dimensions")
        for dim, size in zip(names, tensor.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(f"{name} must be [{dims}] with {dim}={sizes[dim]}, got {size}")


def check_layout(dtype: torch.dtype, **tensors: Tensor) -> None:
    """
    Raises:
        ValueError: not a whole tensor of this dtype, or one of numbers that begins where 16 bytes
            cannot be read at once.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} must be {dtype} and contiguous")
        if dtype.is_floating_point and tensor.data_ptr() % 16:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes")


@lru_cache(maxsize=256)
def _names(dims: str) -> tuple[str, ...]:
    return tuple(dims.split())
