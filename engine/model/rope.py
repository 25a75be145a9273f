"""Rotary position embedding: one cosine and sine table per model, gathered by position.

Shapes: T tokens, H heads, D head_dim, M positions. The frequency rules are those of
transformers' `modeling_rope_utils` (default, linear, llama3, yarn).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.model.config import RopeConfig


class RotaryEmbedding:
    """Tables cos and sin, float32 [M, D], with both halves of D filled (rotate-half layout)."""

    def __init__(
        self, config: RopeConfig, head_dim: int, max_positions: int, device: torch.device
    ) -> None:
        frequencies, scale = rope_frequencies(config, head_dim, max_positions)
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles_MD = torch.outer(positions, frequencies).repeat(1, 2)
        self._cos_MD = (angles_MD.cos() * scale).to(device)
        self._sin_MD = (angles_MD.sin() * scale).to(device)

    def tables(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, 1, D] in `dtype`, for int64 `positions_T`."""
        cos = self._cos_MD[positions_T].to(dtype).unsqueeze(1)
        return cos, self._sin_MD[positions_T].to(dtype).unsqueeze(1)


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the tables of `RotaryEmbedding.tables` to queries or keys."""
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos + torch.cat((-second, first), dim=-1) * sin


def rope_frequencies(config: RopeConfig, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Angular frequencies, float32 [D / 2], and the factor on cos and sin."""
    base = 1.0 / config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if config.kind == "linear":
        return base / config.factor, 1.0
    if config.kind == "llama3":
        return _llama3(config, base), 1.0
    if config.kind == "yarn":
        return _yarn(config, base, head_dim), _yarn_scale(config)
    return base, 1.0


def _llama3(config: RopeConfig, base: Tensor) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones stay, those between are blended."""
    wavelength = 2 * math.pi / base
    longest = config.original_max_position / config.low_freq_factor
    shortest = config.original_max_position / config.high_freq_factor
    blend = (config.original_max_position / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - blend) * base / config.factor + blend * base
    scaled = torch.where(wavelength > longest, base / config.factor, blended)
    return torch.where(wavelength < shortest, base, scaled)


def _yarn(config: RopeConfig, base: Tensor, head_dim: int) -> Tensor:
    """Interpolate the slow dimensions, keep the fast ones, ramp between (arXiv 2309.00071)."""

    def dimension(rotations: float) -> float:
        ratio = config.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    index = torch.arange(head_dim // 2, dtype=torch.float32)
    keep = 1 - ((index - low) / (high - low)).clamp(0, 1)
    return base / config.factor * (1 - keep) + base * keep


def _yarn_scale(config: RopeConfig) -> float:
    def mscale(factor: float, weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.factor, config.mscale) / mscale(config.factor, config.mscale_all_dim)
    return mscale(config.factor, 1.0)
