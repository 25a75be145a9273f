"""The indexer without gradient steps: a low-rank factorisation from second moments.

A retrieval head scores key k, which stands D tokens before query q, with q^T R(D) k / sqrt(d): R(D)
is the rotation of RoPE, q and k are taken before it. The indexer does not know D. If q, k and D are
independent, the best guess of the score from q and k alone (least squares) is its mean over D,

    q^T B k / sqrt(d),   B = E[R(D)],

which keeps the slow pairs of dimensions and averages the fast ones away; D is uniform up to a
horizon (horizon 0: B is the identity, the plain pre-RoPE product). What is the same for all keys of
a query drops out of a softmax, so keys count by their deviation from their mean. The rank-r error

    E[(q^T (B / sqrt(d) - W_Q^T W_K) (k - mean k))^2]
        = || C_q^(1/2) (B / sqrt(d) - W_Q^T W_K) C_k^(1/2) ||_F^2

with C_q the second moment of the queries and C_k the covariance of the keys is least (Eckart and
Young) for W_Q^T W_K = C_q^(-1/2) U_r S_r V_r^T C_k^(-1/2), where U S V^T is the singular value
decomposition of C_q^(1/2) B C_k^(1/2) / sqrt(d). exp(W_Q q . W_K k) then stands for exp(attention
score), up to a factor per query: no scale is needed at run time.

Shapes: T tokens, D head_dim, I index_dim, G query heads that share one key projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-6  # of the mean eigenvalue; directions without energy cannot be divided by it


@dataclass(slots=True)
class Moments:
    """Running sums of vectors and of their outer products, float64 on the host.

    Sums over a document are made where its vectors are.
    """

    count: float
    sum_D: Tensor
    outer_DD: Tensor

    @classmethod
    def empty(cls, dim: int) -> Moments:
        zeros = torch.zeros(dim, dim, dtype=torch.float64)
        return cls(0.0, zeros[0].clone(), zeros)

    def add(self, x_TD: Tensor, weight_T: Tensor | None = None) -> None:
        """Add vectors, each counted `weight_T` times (once if None)."""
        x_TD = x_TD.double()
        weighted_TD = x_TD if weight_T is None else x_TD * weight_T.double()[:, None]
        self.count += len(x_TD) if weight_T is None else float(weight_T.sum())
        self.sum_D += weighted_TD.sum(0).cpu()
        self.outer_DD += (x_TD.T @ weighted_TD).cpu()

    @property
    def second(self) -> Tensor:
        """E[x x^T]."""
        return self.outer_DD / self.count

    @property
    def covariance(self) -> Tensor:
        """E[x x^T] - E[x] E[x]^T."""
        mean_D = self.sum_D / self.count
        return self.second - torch.outer(mean_D, mean_D)


def mean_rotation(frequencies: Tensor, horizon: float) -> Tensor:
    """B = E[R(D)] for D uniform in [0, horizon], float64 [D, D], in the rotate-half layout.

    q^T R(D) k is the product of q rotated to its place with k rotated to its own, D places earlier.

    Args:
        frequencies: angular frequencies of the pairs, [D / 2], radians per token.
        horizon: tokens; 0 gives the identity.
    """
    angle = frequencies.double() * horizon
    safe = angle.clamp(min=1e-9)
    cos, sin = torch.sin(safe) / safe, (1 - torch.cos(safe)) / safe
    return torch.cat(
        (
            torch.cat((torch.diag(cos), torch.diag(sin)), dim=1),
            torch.cat((torch.diag(-sin), torch.diag(cos)), dim=1),
        )
    )


def factorise(
    q_second_GDD: Tensor, k_covariance_DD: Tensor, target_DD: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """The W_Q [G, rank, D] and the common W_K [rank, D] of least error, float64.

    With G > 1 the whitened targets of the heads are stacked, so that the one W_K serves all.

    Args:
        q_second_GDD: C_q per query head.
        k_covariance_DD: C_k.
        target_DD: B / sqrt(d).
        rank: index_dim, at most D.
    """
    roots = [_roots(moment_DD) for moment_DD in q_second_GDD]
    k_root_DD, k_inverse_DD = _roots(k_covariance_DD)
    whitened = torch.cat([root_DD @ target_DD @ k_root_DD for root_DD, _ in roots])
    u, s, vh = torch.linalg.svd(whitened, full_matrices=False)
    size_I = s[:rank].sqrt()
    left_GDI = (u[:, :rank] * size_I).view(len(roots), -1, rank)
    w_q_GID = torch.stack(
        [left_DI.T @ inverse for left_DI, (_, inverse) in zip(left_GDI, roots, strict=True)]
    )
    w_k_ID = (vh[:rank] * size_I[:, None]) @ k_inverse_DD
    return w_q_GID, w_k_ID


def _roots(moment_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and its inverse of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(moment_DD.double())
    floor = RIDGE * values.mean().clamp(min=1e-30)
    root = values.clamp(min=float(floor)).sqrt()
    return vectors @ (root[:, None] * vectors.T), vectors @ (vectors.T / root[:, None])
