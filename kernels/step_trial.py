"""Tries out the kernels at the ends of a decode step, `place_rows` and `pick_tokens`.

Answers are exact. Shapes as in `kernels.step_ops`; twins run on the CPU.
"""

from __future__ import annotations

import torch

from kernels import cuda_step, step_ops
from kernels._launch import KernelLibrary
from kernels.trial import check_close, check_equal, random_numbers

ROWS = 4
WIDTH = 300  # of block tables: more than a CTA has threads
HEADS = 70  # that select


def try_step(
    library: KernelLibrary,
    dtype: torch.dtype,
    block_tokens: int,
    vocab_size: int,
    hidden_size: int,
    device: torch.device,
) -> None:
    """
    Args:
        vocab_size, hidden_size: of the model.

    Raises:
        TrialError: a kernel gives something else than its twin.
        KernelError: a launch failed.
    """
    _try_place(library, block_tokens, device)
    for counted in (True, False):
        _try_pick(library, dtype, vocab_size, hidden_size, device, counted=counted)


def _try_place(library: KernelLibrary, block_tokens: int, device: torch.device) -> None:
    """Rows of any tables, two of which go on from the newest token; the last pads."""
    generator = torch.Generator().manual_seed(7)
    inputs_8R = torch.randint(1, WIDTH * block_tokens, (8, ROWS), generator=generator)
    inputs_8R[3] = torch.arange(ROWS).flip(0)
    inputs_8R[0, :2] = step_ops.NEWEST_TOKEN
    inputs_8R[:7, -1] = 0
    inputs_8R[7] = torch.tensor([0.25, torch.nan, 1.0, torch.nan]).double().view(torch.int64)
    tables_SB = torch.randint(1, 1000, (2, ROWS, WIDTH), generator=generator)
    on_device = tables_SB.clone().to(device)
    newest_S = torch.randint(1, 1000, (ROWS,), generator=generator)
    given = (inputs_8R, newest_S, tables_SB[0], tables_SB[1])
    there = (inputs_8R.to(device), newest_S.to(device), on_device[0], on_device[1])
    found = cuda_step.place_rows(library, *there, block_tokens)
    want = step_ops.place_rows(*given, block_tokens)
    check_equal("place_rows", found.token_ids_R, want.token_ids_R)
    for pool in (0, 1):
        check_equal("place_rows", found.token_slots_R[pool], want.token_slots_R[pool])
        check_equal("place_rows", found.tables_RB[pool], want.tables_RB[pool])
    check_equal("place_rows", found.top_p_R, want.top_p_R)
    check_equal("place_rows", on_device, tables_SB)


def _try_pick(
    library: KernelLibrary,
    dtype: torch.dtype,
    vocab_size: int,
    hidden_size: int,
    device: torch.device,
    *,
    counted: bool,
) -> None:
    """Equal logits in one row, a number that is not finite in another; the first row pads."""
    random = random_numbers(dtype, seed=8)
    logits_RV, hidden_RE = random(ROWS, vocab_size), random(ROWS, hidden_size)
    logits_RV[1] = 1.0
    hidden_RE[2, -1] = torch.inf
    counts_RH = (torch.arange(ROWS * HEADS) % 3 * 100).view(ROWS, HEADS) if counted else None
    rows_R = torch.arange(ROWS)
    inputs_8R = torch.zeros(step_ops.INPUT_ROWS, ROWS, dtype=torch.int64)
    inputs_8R[2], inputs_8R[6] = rows_R * 300, rows_R % 2
    inputs_8R[step_ops.TABLE_ROW] = rows_R.flip(0)
    newest_S = torch.full((ROWS,), vocab_size)
    newest_there = newest_S.clone().to(device)
    found = cuda_step.pick_tokens(
        library,
        logits_RV.to(device),
        hidden_RE.to(device),
        None if counts_RH is None else counts_RH.to(device),
        inputs_8R.to(device),
        newest_there,
    )
    want = step_ops.pick_tokens(logits_RV, hidden_RE, counts_RH, inputs_8R, newest_S)
    check_close("pick_tokens", found, want, rtol=1e-12, atol=0.0)
    check_equal("pick_tokens", newest_there, newest_S)
