"""How far a row looks, and what rows that do weigh."""

from __future__ import annotations

import pytest
import torch

from conversion.far_rows import far_mass, row_weights
from kernels.indexer import select_blocks

BLOCK, TOKENS = 16, 160


def test_far_is_what_selection_may_leave_out() -> None:
    """An index with all its mass in the first block keeps nothing but what is forced."""
    rows_R = torch.tensor([5, 16, 40, 48, 63, 64, 100, 159])
    generator = torch.Generator().manual_seed(0)
    scores_RT = torch.randn(len(rows_R), TOKENS, generator=generator)
    scores_RT = scores_RT.masked_fill(torch.arange(TOKENS) > rows_R[:, None], float("-inf"))
    log_RT = scores_RT.log_softmax(-1)
    log_mass_RHB = torch.full((len(rows_R), 1, TOKENS // BLOCK), -100.0)
    log_mass_RHB[..., 0] = 0.0
    kept_RB = select_blocks(log_mass_RHB, torch.full((len(rows_R), 1), 0.9), rows_R + 1, BLOCK)[
        :, 0
    ]
    left_RT = ~kept_RB.repeat_interleave(BLOCK, dim=1)
    expected_R = (log_RT.exp() * left_RT).sum(1)
    torch.testing.assert_close(far_mass(log_RT, rows_R, BLOCK), expected_R)
    assert expected_R[-1] > 0.5
    assert expected_R[0] == 0


def test_half_of_the_weight_goes_to_the_few_rows_that_look_far() -> None:
    far_R = torch.zeros(100)
    far_R[:9] = 1.0
    weights_R = row_weights(far_R, 0.5)
    assert float(weights_R.sum()) == pytest.approx(1)
    assert float(weights_R[:9].sum()) == pytest.approx(0.45 + 0.55 * 0.09)
    torch.testing.assert_close(weights_R[9:], torch.full((91,), 0.55 / 100))


def test_what_a_near_head_sees_far_is_noise_and_weighs_nothing() -> None:
    noise_R = torch.full((256,), 1e-5)
    noise_R[3] = 1e-3
    weights_R = row_weights(noise_R, 0.5)
    torch.testing.assert_close(weights_R, torch.full((256,), 1 / 256), rtol=0.2, atol=0)


def test_without_a_share_all_rows_weigh_the_same() -> None:
    weights_R = row_weights(torch.rand(10, generator=torch.Generator().manual_seed(0)), 0.0)
    torch.testing.assert_close(weights_R, torch.full((10,), 0.1))
