"""How well an indexer selects: the attention it keeps, and how many blocks that takes.

Both sides use the rule that serves (`kernels.indexer.select_blocks`): the indexer with its own
masses, the teacher with the true attention. Shapes: R sampled queries, T keys, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.indexer import select_blocks


@dataclass(frozen=True, slots=True)
class IndexQuality:
    """Means over queries of one head."""

    kept_mass: float  # of the teacher's attention, in the blocks that the indexer selects
    blocks: float  # selected by the indexer
    teacher_blocks: float  # that the same rule selects with the true attention
    context_blocks: float  # that there are


def block_log_mass(log_RT: Tensor, block_tokens: int) -> Tensor:
    """Logsumexp per block of keys, float32 [R, B]; -inf entries count nothing."""
    padded = pad(log_RT.float(), (0, -log_RT.shape[1] % block_tokens), value=float("-inf"))
    return padded.view(len(log_RT), -1, block_tokens).logsumexp(-1)


def select(log_mass_RB: Tensor, rows_R: Tensor, top_p: float, block_tokens: int) -> Tensor:
    """Blocks kept by the decode rule for queries at positions `rows_R`, bool [R, B]."""
    wanted_R1 = torch.full((len(rows_R), 1), top_p, device=rows_R.device)
    return select_blocks(log_mass_RB.unsqueeze(1), wanted_R1, rows_R + 1, block_tokens)[:, 0]


def measure(
    log_attention_RT: Tensor,
    index_scores_RT: Tensor,
    rows_R: Tensor,
    top_p: float,
    block_tokens: int,
) -> IndexQuality:
    """Compare a selection with the teacher.

    Args:
        log_attention_RT: true log-probabilities, -inf past each row's position.
        index_scores_RT: the indexer's scores, -inf at the same keys.
        rows_R: position of each query.
    """
    teacher_RB = block_log_mass(log_attention_RT, block_tokens)
    student_RB = block_log_mass(index_scores_RT, block_tokens)
    kept_RB = select(student_RB, rows_R, top_p, block_tokens)
    needed_RB = select(teacher_RB, rows_R, top_p, block_tokens)
    return IndexQuality(
        kept_mass=float((teacher_RB.exp() * kept_RB).sum(-1).mean()),
        blocks=float(kept_RB.sum(-1).float().mean()),
        teacher_blocks=float(needed_RB.sum(-1).float().mean()),
        context_blocks=float((rows_R // block_tokens + 1).float().mean()),
    )
