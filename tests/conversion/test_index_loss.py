"""The divergences against their definitions, and their gradients against a second formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from conversion.document_attention import hide_future
from conversion.index_loss import HIDDEN, block_kl, block_log_mass, index_loss, token_kl

BLOCK, TOKENS = 8, 61
ROWS = torch.tensor([0, 7, 8, 40, 60])


def scores(seed: int) -> Tensor:
    """Random scores [R, T], float64, nothing hidden yet."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(len(ROWS), TOKENS, generator=generator, dtype=torch.float64)


def attention() -> Tensor:
    return hide_future(scores(0), ROWS).log_softmax(-1)


def naive(log_RT: Tensor, scores_RT: Tensor, *, blocks: bool) -> Tensor:
    """KL row by row over the keys (or blocks) that are there, by torch's own divergence."""
    found = []
    for row, position in enumerate(ROWS.tolist()):
        q = scores_RT[row, : position + 1].softmax(0)
        p = log_RT[row, : position + 1].exp()
        if blocks:
            q, p = (torch.stack([part.sum() for part in torch.split(x, BLOCK)]) for x in (q, p))
        found.append(kl_div(q.log(), p, reduction="sum"))
    return torch.stack(found)


def test_token_kl_is_the_divergence() -> None:
    found = token_kl(attention(), hide_future(scores(1), ROWS))
    torch.testing.assert_close(found, naive(attention(), scores(1), blocks=False))
    assert found[0] == pytest.approx(0.0, abs=1e-12)  # one key, one distribution
    assert (found[1:] > 0.1).all()


def test_block_kl_is_the_divergence_of_block_masses() -> None:
    found = block_kl(attention(), hide_future(scores(1), ROWS), BLOCK)
    expected = naive(attention(), scores(1), blocks=True)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)  # masses in float32
    assert (found <= token_kl(attention(), hide_future(scores(1), ROWS)) + 1e-6).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_the_definition(share: float) -> None:
    """Keys that are hidden get none, and none is NaN."""
    own, other = (scores(1).requires_grad_() for _ in range(2))
    torch.autograd.backward(index_loss(attention(), hide_future(own + 0, ROWS), BLOCK, share).sum())
    tokens, blocks = (naive(attention(), other, blocks=kind) for kind in (False, True))
    torch.autograd.backward(((1 - share) * tokens + share * blocks).sum())
    torch.testing.assert_close(own.grad, other.grad, atol=1e-6, rtol=1e-5)
    assert own.grad is not None
    assert (own.grad[1, 8:] == 0).all()
    assert own.grad.abs().max() > 0.01


def test_hidden_blocks_have_no_mass() -> None:
    log_RB = block_log_mass(attention(), BLOCK)
    assert log_RB.shape == (len(ROWS), 8)
    assert (log_RB[0, 1:] < HIDDEN).all()
    torch.testing.assert_close(log_RB.exp().sum(-1), torch.ones(len(ROWS)))
