"""Contexts, dtypes and head maps that decode kernels are tried with on a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.head_tiles import HeadRole

EDGES = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 400, 2047, 2048, 2049]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])

# A layer of Qwen3-30B-A3B: 32 query heads in groups of 8; five retrieval heads on two KV heads.
RETRIEVAL = {1: 0, 3: 1, 6: 2, 12: 3, 15: 4}
PRODUCTION = [
    HeadRole(
        "full" if head < 16 else "window",
        head // 8 % 2,
        retrieval=head in RETRIEVAL,
        selected=RETRIEVAL.get(head),
    )
    for head in range(32)
]
