"""How well an indexer selects: the attention it keeps, and how many blocks that takes.

Both sides use the rule that serves (`kernels.indexer.select_blocks`): the indexer with its own
masses, the teacher with the true attention.

Shapes: R sampled queries, T keys, B blocks, S temperatures, P values of top_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from conversion.index_loss import block_log_mass, token_kl
from kernels.indexer import select_blocks

MAX_SELECTED = 2**23  # elements of a mask made at once


@dataclass(frozen=True, slots=True)
class IndexQuality:
    """Means over queries of one head."""

    kept_mass: float  # of the teacher's attention, in the blocks that the indexer selects
    blocks: float  # selected by the indexer
    teacher_blocks: float  # that the same rule selects with the true attention
    context_blocks: float  # that there are
    kl: float  # nats, true attention against the softmax of the index scores

    @classmethod
    def from_values(cls, values: Sequence[float]) -> IndexQuality:
        return cls(*values)

    def values(self) -> list[float]:
        """The fields in order."""
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True, slots=True)
class SelectionGrid:
    """Means over queries by temperature and top_p, float64 on the CPU."""

    kept_SP: Tensor  # of the teacher's attention
    blocks_SP: Tensor


def selection_grid(
    log_attention_RT: Tensor,
    index_scores_RT: Tensor,
    rows_R: Tensor,
    temperatures: Sequence[float],
    top_p: Sequence[float],
    block_tokens: int,
) -> SelectionGrid:
    """What the rule selects when the scores are multiplied by each temperature.

    Args:
        log_attention_RT: true log-probabilities, -inf past each row's position.
        index_scores_RT: the indexer's scores, -inf at the same keys.
        rows_R: position of each query.
    """
    teacher_RB = block_log_mass(log_attention_RT, block_tokens).exp()
    wanted_P = torch.tensor(top_p, device=rows_R.device)
    kept, blocks = [], []
    per_row = len(top_p) * max(teacher_RB.shape[1], 256)  # 256: bins of the selection's histogram
    parts = torch.split(torch.arange(len(rows_R)), max(1, MAX_SELECTED // per_row))
    for temperature in temperatures:
        student_RB = block_log_mass(index_scores_RT * temperature, block_tokens)
        kept_P, blocks_P = torch.zeros(2, len(top_p), dtype=torch.float64)
        for part in parts:
            log_mass_RPB = student_RB[part].unsqueeze(1).expand(-1, len(top_p), -1)
            wanted_RP = wanted_P.expand(len(part), -1)
            mask_RPB = select_blocks(log_mass_RPB, wanted_RP, rows_R[part] + 1, block_tokens)
            kept_P += (teacher_RB[part].unsqueeze(1) * mask_RPB).sum((0, 2)).double().cpu()
            blocks_P += mask_RPB.sum((0, 2)).double().cpu()
        kept.append(kept_P / len(rows_R))
        blocks.append(blocks_P / len(rows_R))
    return SelectionGrid(torch.stack(kept), torch.stack(blocks))


def measure(
    log_attention_RT: Tensor,
    index_scores_RT: Tensor,
    rows_R: Tensor,
    top_p: Sequence[float],
    block_tokens: int,
) -> list[IndexQuality]:
    """Compare selections with the teacher's, one for each value of top_p; arguments as above."""

    def grid(scores_RT: Tensor) -> SelectionGrid:
        return selection_grid(log_attention_RT, scores_RT, rows_R, (1.0,), top_p, block_tokens)

    student, teacher = grid(index_scores_RT), grid(log_attention_RT)
    context = float((rows_R // block_tokens + 1).float().mean())
    kl = float(token_kl(log_attention_RT, index_scores_RT).mean())
    columns = (student.kept_SP[0], student.blocks_SP[0], teacher.blocks_SP[0])
    return [
        IndexQuality(kept, blocks, needed, context, kl)
        for kept, blocks, needed in zip(*(c.tolist() for c in columns), strict=True)
    ]
