"""The factorisation against brute force: what it must recover, and that nothing does better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conversion.closed_form import Moments, factorise, mean_rotation
from engine.model.config import RopeConfig
from engine.model.rope import RotaryEmbedding, rotate

DIM = 12


def sample(count: int, seed: int, rank: int = DIM) -> Tensor:
    """Correlated vectors with a mean, [count, DIM] float64, in a subspace of `rank` dimensions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (normal(count, rank) * 2 ** normal(rank) + normal(rank)) @ normal(rank, DIM)


def moments(x_TD: Tensor) -> Moments:
    found = Moments.empty(DIM)
    for start in range(0, len(x_TD), 17):
        found.add(x_TD[start : start + 17])
    return found


def centred_scores(q_TD: Tensor, k_TD: Tensor, form_DD: Tensor) -> Tensor:
    """q^T form (k - mean k) of all pairs: what a softmax over the keys sees."""
    return q_TD @ form_DD @ (k_TD - k_TD.mean(0)).T


def test_an_exactly_low_rank_product_is_recovered() -> None:
    """Queries in a 4-dimensional subspace: 4 index dimensions give the attention itself."""
    q_TD, k_TD = sample(100, 1, rank=4), sample(90, 2)
    w_q_GID, w_k_ID = factorise(
        moments(q_TD).second[None],
        moments(k_TD).covariance,
        torch.eye(DIM, dtype=torch.float64) / DIM**0.5,
        rank=4,
    )
    index_TT = (q_TD @ w_q_GID[0].T) @ (k_TD @ w_k_ID.T).T
    true_TT = q_TD @ k_TD.T / DIM**0.5
    torch.testing.assert_close(index_TT.softmax(-1), true_TT.softmax(-1), atol=1e-4, rtol=1e-3)
    assert (true_TT.softmax(-1).amax(-1) > 0.5).any(), "the softmax must say something"


def test_the_error_is_the_least_that_the_rank_allows() -> None:
    """The mean squared error over all pairs equals the discarded spectrum, and grows all round."""
    q_TD, k_TD = sample(200, 3), sample(150, 4)
    target_DD = torch.eye(DIM, dtype=torch.float64)
    c_q, c_k = moments(q_TD).second, moments(k_TD).covariance
    w_q_GID, w_k_ID = factorise(c_q[None], c_k, target_DD, rank=3)

    def error(form_DD: Tensor) -> float:
        return centred_scores(q_TD, k_TD, target_DD - form_DD).square().mean().item()

    # The eigenvalues of C_q C_k are the squares of the whitened product's singular values.
    spectrum = torch.linalg.eigvals(c_q @ c_k).real.sort(descending=True).values
    best = error(w_q_GID[0].T @ w_k_ID)
    assert best == pytest.approx(spectrum[3:].sum().item(), rel=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        noise_q, noise_k = (
            1e-2 * torch.randn(w.shape, generator=generator, dtype=torch.float64) * w.abs().mean()
            for w in (w_q_GID[0], w_k_ID)
        )
        assert error((w_q_GID[0] + noise_q).T @ (w_k_ID + noise_k)) > best
    plain = torch.linalg.svd(target_DD)
    assert best < error(plain.U[:, :3] @ plain.Vh[:3]), "whitening must help"


def test_one_key_projection_serves_all_heads_of_a_group() -> None:
    """Stacked heads: the total error equals the discarded spectrum of both targets together."""
    queries, k_TD = [sample(200, 5), sample(200, 6)], sample(150, 7)
    target_DD = torch.eye(DIM, dtype=torch.float64)
    seconds = torch.stack([moments(q_TD).second for q_TD in queries])
    c_k = moments(k_TD).covariance
    w_q_GID, w_k_ID = factorise(seconds, c_k, target_DD, rank=5)
    assert (w_q_GID.shape, w_k_ID.shape) == ((2, 5, DIM), (5, DIM))
    total = sum(
        centred_scores(q_TD, k_TD, target_DD - w_q_ID.T @ w_k_ID).square().mean().item()
        for q_TD, w_q_ID in zip(queries, w_q_GID, strict=True)
    )
    spectrum = torch.linalg.eigvals(seconds.sum(0) @ c_k).real.sort(descending=True).values
    assert total == pytest.approx(spectrum[5:].sum().item(), rel=1e-3)


def test_weights_count_like_repetitions() -> None:
    x_TD = sample(6, 8)
    times = torch.tensor([3, 1, 0, 2, 1, 1])
    weighted = Moments.empty(DIM)
    weighted.add(x_TD, times)
    repeated = moments(x_TD.repeat_interleave(times, dim=0))
    torch.testing.assert_close(weighted.second, repeated.second)
    torch.testing.assert_close(weighted.covariance, repeated.covariance)


def test_the_mean_rotation_is_the_mean_of_the_rotary_product() -> None:
    """q^T B k against rotary products averaged over every distance up to the horizon."""
    rope = RopeConfig(theta=100.0)
    horizon, place = 400, 500
    q_D, k_D = sample(1, 9)[0], sample(1, 10)[0]
    tables = RotaryEmbedding(rope, DIM, torch.device("cpu"))

    def rotated(x_D: Tensor, positions: Tensor) -> Tensor:
        cos, sin = tables.tables(positions, torch.float32)
        many = x_D.float().expand(len(positions), 1, DIM)
        return rotate(many, cos, sin)[:, 0].double()

    distances = torch.arange(horizon + 1)
    products = rotated(k_D, place - distances) @ rotated(q_D, torch.tensor([place]))[0]
    frequencies = 1.0 / rope.theta ** (torch.arange(0, DIM, 2) / DIM)
    mean = q_D @ mean_rotation(frequencies, horizon) @ k_D
    # Trapezoid sum against the integral: the fastest pair turns by one radian a token.
    trapezoid = torch.trapezoid(products, dx=1.0) / horizon
    assert mean.item() == pytest.approx(trapezoid.item(), abs=2e-3 * products.abs().max().item())
    assert abs(mean.item() - (q_D @ k_D).item()) > 0.1 * products.abs().max().item()


def test_no_horizon_is_the_plain_product() -> None:
    frequencies = 1.0 / 100.0 ** (torch.arange(0, DIM, 2) / DIM)
    identity = torch.eye(DIM, dtype=torch.float64)
    torch.testing.assert_close(mean_rotation(frequencies, 0.0), identity, atol=1e-8, rtol=0)
