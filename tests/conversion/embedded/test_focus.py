"""The focus loss against a direct computation, and what it does to a head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conversion.embedded.focus import BLOCK_TOKENS, ROWS, FocusIndex, sampled_rows
from kernels.block_age import age_bias

HEADS, GROUP, KV_HEADS, DIM = (0, 2, 3), 2, 2, 16
LENGTH, SEQUENCES = 4 * BLOCK_TOKENS, 2


@pytest.fixture
def index() -> FocusIndex:
    index = FocusIndex(HEADS, GROUP, DIM)
    index.initialise(torch.Generator().manual_seed(0))
    index.age_bias_HA.data.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(1))
    return index


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys before and after RoPE, which stand for any."""
    generator = torch.Generator().manual_seed(2)

    def random(heads: int) -> Tensor:
        x = torch.randn(SEQUENCES * LENGTH, heads, DIM, generator=generator)
        return x.requires_grad_()

    return random(2 * GROUP), random(KV_HEADS), random(2 * GROUP), random(KV_HEADS)


def expected_row(
    index: FocusIndex, tensors: tuple[Tensor, ...], sequence: int, head: int, row: int
) -> Tensor:
    """Cross-entropy of one head's block masses at one position, from their definition."""
    own = slice(sequence * LENGTH, sequence * LENGTH + row + 1)
    q_pre, k_pre, q, k = (x[own, HEADS[head] // (GROUP if x.shape[1] == KV_HEADS else 1)]
                          for x in tensors)  # fmt: skip
    attention = torch.softmax(k @ q[-1] / DIM**0.5, 0)
    keys = k_pre @ index.k_proj_XID[HEADS[head] // GROUP].T
    scores = keys @ (index.q_proj_HID[head] @ q_pre[-1])
    blocks = [slice(i, i + BLOCK_TOKENS) for i in range(0, row + 1, BLOCK_TOKENS)]
    bias = age_bias(index.age_bias_HA * 10, torch.tensor([row + 1]), len(blocks), BLOCK_TOKENS)
    masses = torch.stack([scores[block].logsumexp(0) for block in blocks]) + bias[0, head]
    shares = torch.stack([attention[block].sum() for block in blocks])
    return -(shares * masses.log_softmax(0)).sum()


def test_the_loss_is_the_cross_entropy_of_block_masses(
    index: FocusIndex, tensors: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    rows_ZR = torch.tensor([[0, 63, 64, 200], [255, 128, 1, 130]])
    rows = [
        expected_row(index, tensors, z, h, int(row))
        for z in range(SEQUENCES)
        for h in range(len(HEADS))
        for row in rows_ZR[z]
    ]
    torch.testing.assert_close(index(*tensors, rows_ZR), torch.stack(rows).mean())


def test_gradients_reach_the_index_and_the_model(
    index: FocusIndex, tensors: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    loss = index(*tensors, torch.tensor([[150, 255], [90, 200]]))
    torch.autograd.backward(loss)
    for x in (*tensors, *index.parameters()):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.abs().sum() > 0
    assert tensors[0].grad is not None
    assert not tensors[0].grad[:, 1].any(), "head 1 is not a retrieval head"


def test_it_makes_a_head_need_fewer_blocks_and_an_index_find_them() -> None:
    """Queries and keys move so that attention lies in few blocks and the index agrees."""
    generator = torch.Generator().manual_seed(3)
    shape = (LENGTH, 1, DIM)
    q, k = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
    one = FocusIndex((0,), 1, DIM)
    one.initialise(generator)
    rows_ZR = torch.arange(100, LENGTH, 8)[None]
    optimizer = torch.optim.Adam([q, k, *one.parameters()], lr=3e-2)
    losses = []
    for _ in range(60):
        loss = one(q, k, q, k, rows_ZR)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_rows_are_answers_first_and_follow_from_the_ids() -> None:
    ids_ZL = torch.arange(2 * 1024).view(2, 1024)
    weights_ZL = torch.ones(2, 1024)
    weights_ZL[0, 900:910] = 5.0
    weights_ZL[1, 100:400] = 5.0
    rows_ZR = sampled_rows(weights_ZL, ids_ZL)
    assert rows_ZR.shape == (2, ROWS)
    assert set(range(900, 910)) <= set(rows_ZR[0].tolist()), "all answers, where they are few"
    assert all(100 <= row < 400 for row in rows_ZR[1, : ROWS // 2].tolist())
    assert rows_ZR[:, ROWS // 2 :].float().mean(1).sub(512).abs().max() < 100, "of all positions"
    assert torch.equal(rows_ZR, sampled_rows(weights_ZL, ids_ZL))
    assert not torch.equal(rows_ZR[0], sampled_rows(weights_ZL, ids_ZL + 1)[0])
