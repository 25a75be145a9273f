"""Building blocks of a decoder layer: norm, SwiGLU MLP, and the projections around attention.

Shapes: T tokens, E hidden size, F intermediate size, H query heads, N KV heads,
X = H + N, R = H + 2 N, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.config import ModelConfig
from engine.model.layer_kernels import LayerKernels
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


@runtime_checkable
class ProjectedAttention(Protocol):
    """Attention that may norm, turn and store by itself: the serving cache, on its kernels."""

    def attend_projection(self, layer: int, projection: Projection) -> Tensor:
        """Attention output [T, H, D]."""
        ...


@dataclass(frozen=True, slots=True)
class Projection:
    """Queries, keys and values of a layer as they leave the product, and what is done to them."""

    qkv_TRD: Tensor
    heads: int  # H
    norm: QKNorm | None
    cos: Tensor  # [T, 1, D / 2], as sin
    sin: Tensor

    def rotated(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `Attention.attend` takes after the layer."""
        kv_heads = (self.qkv_TRD.shape[1] - self.heads) // 2
        sizes = [self.heads, kv_heads]
        qk_TXD, v_TND = torch.split(self.qkv_TRD, [sum(sizes), kv_heads], dim=1)
        if self.norm is not None:
            qk_TXD = self.norm(qk_TXD)
        q_pre_THD, k_pre_TND = torch.split(qk_TXD, sizes, dim=1)
        q_THD, k_TND = torch.split(rotate(qk_TXD, self.cos, self.sin), sizes, dim=1)
        return q_pre_THD, k_pre_TND, q_THD, k_TND, v_TND


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

    def forward(self, x_TE: Tensor, kernels: LayerKernels | None = None) -> Tensor:
        gate_up_TF = self.gate_up_proj(x_TE)
        if kernels is None:
            gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
            inner_TF = F.silu(gate_TF) * up_TF
        else:
            inner_TF = kernels.silu_mul(gate_up_TF)
        return self.down_proj(inner_TF)  # type: ignore[no-any-return]  # nn.Module


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
        qkv_TRD = self.qkv_proj(x_TE).view(x_TE.shape[0], -1, self.head_dim)
        projection = Projection(qkv_TRD, self.heads, self.qk_norm, cos, sin)
        if isinstance(attention, ProjectedAttention):
            out_THD = attention.attend_projection(self.layer, projection)
        else:
            out_THD = attention.attend(self.layer, *projection.rotated())
        return self.o_proj(out_THD.flatten(1))  # type: ignore[no-any-return]  # nn.Module
