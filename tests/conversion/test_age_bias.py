"""Biases for ages: the same as serving adds, and those that a head needs are found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conversion.age_bias import balanced, settled, with_age_bias
from conversion.index_loss import block_log_mass, index_loss, token_kl
from conversion.parallel import Ranks
from kernels.block_age import AGE_RANGES, age_bias
from tests.conversion.aged_scores import BLOCK, BLOCKS, PLANTED, ROWS, TOKENS, by_range, hidden


def random_scores(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return hidden(torch.randn(len(ROWS), TOKENS, generator=generator))


def served_bias(bias_A: Tensor) -> Tensor:
    """What serving adds to every block, [R, B]."""
    return age_bias(bias_A[None], ROWS + 1, BLOCKS, BLOCK)[:, 0]


def kl(attention_RT: Tensor, scores_RT: Tensor, bias_A: Tensor) -> float:
    return token_kl(attention_RT, with_age_bias(scores_RT, bias_A, ROWS, BLOCK)).mean().item()


def test_scores_with_a_bias_give_the_log_masses_that_serve() -> None:
    scores_RT = random_scores(0)
    found_RB = block_log_mass(with_age_bias(scores_RT, PLANTED, ROWS, BLOCK), BLOCK)
    plain_RB = block_log_mass(scores_RT, BLOCK)
    torch.testing.assert_close(found_RB, plain_RB + served_bias(PLANTED))
    assert float(found_RB[-1, -1] - plain_RB[-1, -1]) == pytest.approx(6.0, abs=1e-5)


@pytest.mark.parametrize("block_share", [0.0, 0.5])
def test_gradients_of_a_bias_are_finite_differences(block_share: float) -> None:
    attention_RT = random_scores(1).log_softmax(-1)
    scores_RT = random_scores(2).double()

    def loss(bias_A: Tensor) -> Tensor:
        aged_RT = with_age_bias(scores_RT, bias_A, ROWS, BLOCK)
        return index_loss(attention_RT, aged_RT, BLOCK, block_share).double().mean()

    bias_A = PLANTED.double().requires_grad_()
    (found_A,) = torch.autograd.grad(loss(bias_A), bias_A)
    step = 1e-2
    for number in range(AGE_RANGES):
        shift_A = torch.zeros(AGE_RANGES, dtype=torch.float64)
        shift_A[number] = step
        slope = (loss(bias_A + shift_A) - loss(bias_A - shift_A)).item() / (2 * step)
        assert found_A[number].item() == pytest.approx(slope, abs=2e-5)
    assert (found_A[:7].abs() > 1e-3).all()


def test_a_head_that_looks_by_age_alone_is_matched_by_its_bias_and_not_without() -> None:
    nothing_RT = hidden(torch.zeros(len(ROWS), TOKENS))
    attention_RT = with_age_bias(nothing_RT, PLANTED, ROWS, BLOCK).log_softmax(-1)
    bias_A = balanced(by_range(nothing_RT)[None], by_range(attention_RT)[None], Ranks())[0]
    torch.testing.assert_close(bias_A, PLANTED, atol=1e-3, rtol=0)
    assert kl(attention_RT, nothing_RT, bias_A) < 1e-5
    assert kl(attention_RT, nothing_RT, torch.zeros(AGE_RANGES)) > 0.5


def test_a_balanced_index_has_attentions_share_in_every_range_and_the_least_kl() -> None:
    """Of two heads at once, whose projections see something else than attention does."""
    scores = [random_scores(seed) for seed in (3, 4)]
    attention = [
        with_age_bias(2 * own, planted_A, ROWS, BLOCK).log_softmax(-1)
        for own, planted_A in zip(scores, (PLANTED, -PLANTED), strict=True)
    ]
    biases_HA = balanced(
        torch.stack([by_range(own) for own in scores]),
        torch.stack([by_range(own) for own in attention]),
        Ranks(),
    )
    for own, true_RT, bias_A in zip(scores, attention, biases_HA, strict=True):
        index_RT = with_age_bias(own, bias_A, ROWS, BLOCK).log_softmax(-1)
        shares, wanted = (by_range(x).exp().mean(0) for x in (index_RT, true_RT))
        torch.testing.assert_close(shares, wanted, atol=1e-4, rtol=1e-2)
        least = kl(true_RT, own, bias_A)
        for number in range(7):
            for shift in (-0.3, 0.3):
                other_A = bias_A.clone()
                other_A[number] += shift
                assert kl(true_RT, own, other_A) > least


def test_a_range_without_attention_gets_a_finite_bias() -> None:
    nothing_RT = hidden(torch.zeros(len(ROWS), TOKENS))
    near_RT = with_age_bias(nothing_RT, PLANTED - 200 * (PLANTED == 0), ROWS, BLOCK)
    attention_RA = by_range(near_RT.log_softmax(-1))
    bias_A = balanced(by_range(nothing_RT)[None], attention_RA[None], Ranks())[0]
    assert bias_A.isfinite().all()
    assert 10 < float(bias_A[0] - bias_A[6]) < 20


def test_older_blocks_than_were_seen_count_as_the_oldest_seen() -> None:
    bias_A = settled(PLANTED + torch.arange(16.0), 6)
    assert bias_A[6:].tolist() == [0.0] * 10
    assert float(bias_A[0] - bias_A[4]) == pytest.approx(1.0)
