"""How much is computed at once, by device.

A CPU is fastest with what its caches hold. A GPU is kept waiting by small steps: what a small model
does to a few thousand tokens takes less time than to ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ChunkSizes:
    """Bounds of what one step may hold; none changes a result by more than rounding."""

    prompt_tokens: int  # of one prefill step
    decode_rows: int  # of one decode step, teacher-forced
    scores: int  # queries times keys; some six float32 tensors of it are alive
    trial_scores: int  # the same, times the temperatures that are tried at once
    selected: int  # elements of a selection mask; takes some 50 bytes each


SIZES = {
    "cpu": ChunkSizes(2048, 128, 2**22, 2**19, 2**23),
    "cuda": ChunkSizes(16384, 1024, 2**26, 2**26, 2**25),
}


def chunk_sizes(device: torch.device) -> ChunkSizes:
    """The sizes for a device; one that is not known gets those of a CPU."""
    return SIZES.get(device.type, SIZES["cpu"])
