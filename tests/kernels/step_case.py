"""Random inputs and results of a decode step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.step_ops import INPUT_ROWS, NEWEST_TOKEN, TABLE_ROW


def inputs_of(rows: int, width: int, block: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Inputs [8, rows + 3], of which the last of `rows` pads, the newest tokens, and block tables
    of both pools. Every other row goes on from its newest token."""
    generator = torch.Generator().manual_seed(rows + width)
    inputs = torch.randint(0, width * block, (8, rows + 3), generator=generator)
    inputs[0, ::2] = NEWEST_TOKEN
    inputs[3] = torch.randperm(rows + 3, generator=generator)
    top_p = torch.rand(rows + 3, generator=generator, dtype=torch.float64)
    top_p[::2] = math.nan
    inputs[7] = top_p.view(torch.int64)
    inputs[:7, rows - 1] = 0
    inputs[3, rows - 1] = rows + 3
    full, window = (
        torch.randint(1, 1000, (rows + 4, width), generator=generator) for _ in range(2)
    )
    newest = torch.randint(0, 1000, (rows + 4,), generator=generator)
    return inputs.to(device), newest.to(device), full.to(device), window.to(device)


def step_results(
    rows: int, vocabulary: int, hidden: int, heads: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """What `pick_tokens` takes; of bfloat16 logits many are equal."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(rows, vocabulary, generator=generator).to(dtype)
    states = torch.randn(rows, hidden, generator=generator).to(dtype)
    counts = None
    if heads is not None:
        counts = torch.randint(0, 3, (rows, heads), generator=generator) * 100
    inputs = torch.zeros(INPUT_ROWS, rows, dtype=torch.int64)
    inputs[2] = torch.arange(rows) * 300  # the first row pads
    inputs[TABLE_ROW] = torch.randperm(rows, generator=generator) + 1
    inputs[6] = torch.arange(rows) % 3 % 2
    return logits, states, counts, inputs, torch.full((rows + 2,), vocabulary)
