"""Building blocks of a decoder layer: norm, SwiGLU MLP, and the projections around attention.

Shapes: T tokens, E hidden size, F intermediate size, H query heads, N KV heads,
X = H + N, D head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.config import ModelConfig
from engine.model.rope import rotate


class Attention(Protocol):
    """What a decoder asks of attention. The serving cache, probes and test oracles implement it."""

    def attend(
        self,
        layer: int,
        q_pre_THD: Tensor,
        k_pre_TND: Tensor,
        q_THD: Tensor,
        k_TND: Tensor,
        v_TND: Tensor,
    ) -> Tensor:
        """Attention output [T, H, D]; `pre` is after QK-norm and before RoPE, the rest after."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * _normalised(x, self.eps)


class QKNorm(nn.Module):
    """RMS norm of every head, with one weight for all queries and one for all keys.

    Queries and keys lie side by side in the fused projection, so one call does both.
    `weight` is the queries' [D] followed by the keys' [D].
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.heads = (heads, kv_heads)
        self.weight = nn.Parameter(torch.ones(2 * head_dim))
        self.eps = eps

    def forward(self, qk_TXD: Tensor) -> Tensor:
        """Norm of [T, H + N, D], queries first."""
        parts = zip(self.weight.chunk(2), self.heads, strict=True)
        weight_XD = torch.cat([part.expand(count, -1) for part, count in parts])
        return weight_XD * _normalised(qk_TXD, self.eps)


def _normalised(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square; rounded to x's dtype before any weight, as transformers does."""
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # reads x once, unlike rms_norm
    return (wide * torch.rsqrt(norm * norm / x.shape[-1] + eps)).to(x.dtype)


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, hidden: int, intermediate: int, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x_TE: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up_proj(x_TE).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate_TF) * up_TF)  # type: ignore[no-any-return]  # nn.Module


class AttentionBlock(nn.Module):
    """Projections, QK-norm and RoPE around an injected attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.num_heads
        self.kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.o_proj = nn.Linear(
            config.num_heads * config.head_dim, config.hidden_size, bias=config.o_bias
        )
        self.qk_norm = (
            QKNorm(self.heads, self.kv_heads, self.head_dim, config.rms_norm_eps)
            if config.qk_norm
            else None
        )

    def forward(self, x_TE: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        sizes = [self.heads, self.kv_heads]
        rows_TRD = self.qkv_proj(x_TE).view(x_TE.shape[0], -1, self.head_dim)
        qk_TXD, v_TND = torch.split(rows_TRD, [sum(sizes), self.kv_heads], dim=1)
        if self.qk_norm is not None:
            qk_TXD = self.qk_norm(qk_TXD)
        q_pre_THD, k_pre_TND = torch.split(qk_TXD, sizes, dim=1)
        q_THD, k_TND = torch.split(rotate(qk_TXD, cos, sin), sizes, dim=1)
        out_THD = attention.attend(self.layer, q_pre_THD, k_pre_TND, q_THD, k_TND, v_TND)
        return self.o_proj(out_THD.flatten(1))  # type: ignore[no-any-return]  # nn.Module
