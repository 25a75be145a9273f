"""The measure of a selection against a loop over queries, blocks and tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conversion.chunk_sizes import SIZES
from conversion.document_attention import hide_future
from conversion.index_quality import IndexQuality, measure, selection_grid
from kernels.reference import select_blocks

BLOCK, TOKENS = 8, 61


def test_kept_mass_and_blocks_equal_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_R = torch.tensor([20, 40, 60])
    true_RT, index_RT = (
        hide_future(3 * torch.randn(3, TOKENS, generator=generator), rows_R) for _ in range(2)
    )
    log_RT = true_RT.log_softmax(-1)

    (found,) = measure(log_RT, index_RT, rows_R, (0.6,), BLOCK)

    kept, blocks, needed = 0.0, 0, 0
    for row, position in enumerate(rows_R.tolist()):
        masses = torch.full((2, -(-TOKENS // BLOCK)), float("-inf"))
        for side, values in enumerate((index_RT, log_RT)):
            for block in range(position // BLOCK + 1):
                part = values[row, block * BLOCK : (block + 1) * BLOCK]
                masses[side, block] = part.exp().sum().log()
        mask = select_blocks(
            masses.unsqueeze(1), torch.tensor([[0.6]] * 2), torch.tensor([position + 1] * 2), BLOCK
        )[:, 0]
        for token in range(position + 1):
            kept += float(log_RT[row, token].exp()) * bool(mask[0, token // BLOCK])
        blocks, needed = blocks + int(mask[0].sum()), needed + int(mask[1].sum())
    assert found.kept_mass == pytest.approx(kept / 3, rel=1e-5)
    assert (found.blocks, found.teacher_blocks) == pytest.approx((blocks / 3, needed / 3))
    assert found.context_blocks == pytest.approx((3 + 6 + 8) / 3)
    assert found.blocks < found.context_blocks
    index_log_RT = index_RT.log_softmax(-1)
    seen_RT = log_RT > float("-inf")
    terms_RT = (log_RT.exp() * (log_RT - index_log_RT))[seen_RT]
    assert found.kl == pytest.approx(float(terms_RT.sum()) / 3, rel=1e-5)


def test_a_perfect_index_keeps_what_it_is_asked_to() -> None:
    rows_R = torch.arange(30, TOKENS)
    scores = torch.randn(len(rows_R), TOKENS, generator=torch.Generator().manual_seed(1))
    log_RT = hide_future(4 * scores, rows_R).log_softmax(-1)
    (found,) = measure(log_RT, log_RT + 7.0, rows_R, (0.9,), BLOCK)  # a constant is nothing
    assert found.blocks == found.teacher_blocks
    assert 0.9 <= found.kept_mass <= 1.0
    assert found.kl == pytest.approx(0.0, abs=1e-5)
    assert found == IndexQuality.from_values(found.values())


@pytest.mark.parametrize("budget", [1, 20_000, 2**23], ids=["row by row", "in parts", "at once"])
def test_a_grid_is_every_measure_of_scaled_scores(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(SIZES["cpu"], selected=budget, trial_scores=budget)
    monkeypatch.setitem(SIZES, "cpu", few)
    generator = torch.Generator().manual_seed(2)
    rows_R = torch.arange(30, TOKENS)
    true_RT, index_RT = (
        hide_future(3 * torch.randn(len(rows_R), TOKENS, generator=generator), rows_R)
        for _ in range(2)
    )
    log_RT = true_RT.log_softmax(-1)
    grid = selection_grid(log_RT, index_RT, rows_R, (0.5, 2.0), (0.5, 0.9, 0.99), BLOCK)
    for step, temperature in enumerate((0.5, 2.0)):
        scaled_RT = index_RT * temperature
        found = measure(log_RT, scaled_RT, rows_R, (0.5, 0.9, 0.99), BLOCK)
        assert grid.kept_SP[step].tolist() == pytest.approx([q.kept_mass for q in found])
        assert grid.blocks_SP[step].tolist() == pytest.approx([q.blocks for q in found])
    assert len(set(grid.blocks_SP.flatten().tolist())) > 3
