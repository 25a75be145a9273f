"""How well an indexer selects: the attention it keeps, and how many blocks that takes.

Both sides use the rule that serves (`kernels.indexer.select_blocks`): the indexer with its own
masses, the teacher with the true attention.

Shapes: R sampled queries, T keys, B blocks, S temperatures, P values of top_p, Q = S R.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from conversion.chunk_sizes import chunk_sizes
from conversion.index_loss import block_log_mass, token_kl
from kernels.indexer import select_blocks
from kernels.reference import BINS


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
    device, sizes = rows_R.device, chunk_sizes(rows_R.device)
    teacher_RB = block_log_mass(log_attention_RT, block_tokens).exp()
    values = torch.tensor((*temperatures, *top_p), device=device)
    factor_S11, wanted_P = values[: len(temperatures), None, None], values[len(temperatures) :]
    sums_2SP = torch.zeros(2, len(temperatures), len(top_p), dtype=torch.float64, device=device)
    per_row = len(top_p) * max(teacher_RB.shape[1], BINS)
    at_once = min(sizes.trial_scores // index_scores_RT.numel(), sizes.selected // per_row)
    for step in _parts(len(temperatures), at_once):
        student_SRB = _block_masses(index_scores_RT * factor_S11[step], block_tokens)
        for part in _parts(len(rows_R), sizes.selected // (per_row * len(student_SRB))):
            mask_SRPB = _selected(student_SRB[:, part], wanted_P, rows_R[part], block_tokens)
            kept_SP = (teacher_RB[part, None] * mask_SRPB).sum((1, 3))
            sums_2SP[:, step] += torch.stack((kept_SP.double(), mask_SRPB.sum((1, 3)).double()))
    kept_SP, blocks_SP = sums_2SP.cpu() / len(rows_R)  # the one time that the device is waited for
    return SelectionGrid(kept_SP, blocks_SP)


def _block_masses(scores_SRT: Tensor, block_tokens: int) -> Tensor:
    """`block_log_mass` for several temperatures, [S, R, B]."""
    mass_QB = block_log_mass(scores_SRT.flatten(0, 1), block_tokens)
    return mass_QB.view(*scores_SRT.shape[:2], -1)


def _parts(count: int, at_once: int) -> Iterator[slice]:
    """Slices of `at_once`, at least 1, that make up `count`."""
    size = max(1, at_once)
    return (slice(first, first + size) for first in range(0, count, size))


def _selected(mass_SRB: Tensor, wanted_P: Tensor, rows_R: Tensor, block_tokens: int) -> Tensor:
    """The rule for every temperature and top_p, bool [S, R, P, B]."""
    temperatures, top_p = len(mass_SRB), len(wanted_P)
    mass_QPB = mass_SRB.flatten(0, 1).unsqueeze(1).expand(-1, top_p, -1)
    wanted_QP = wanted_P.expand(len(mass_QPB), -1)
    mask_QPB = select_blocks(mass_QPB, wanted_QP, rows_R.repeat(temperatures) + 1, block_tokens)
    return mask_QPB.view(temperatures, len(rows_R), top_p, -1)


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
    context_R = (rows_R // block_tokens + 1).float()
    kl_R = token_kl(log_attention_RT, index_scores_RT)
    context, kl = torch.stack((context_R.mean(), kl_R.mean())).tolist()
    columns = (student.kept_SP[0], student.blocks_SP[0], teacher.blocks_SP[0])
    return [
        IndexQuality(kept, blocks, needed, context, kl)
        for kept, blocks, needed in zip(*(c.tolist() for c in columns), strict=True)
    ]
