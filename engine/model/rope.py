"""Rotary position embedding: cosines and sines of a step's positions, shared by all layers.

Shapes: T tokens, H heads, D head_dim. The frequency rules are those of transformers'
`modeling_rope_utils` (default, linear, llama3, yarn).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.model.config import RopeConfig


class RotaryEmbedding:
    """Frequencies on a device, float32 [D / 2].

    The angles of a step are computed rather than looked up: that costs no more than two gathers,
    and a table for a million positions would take half a gigabyte.
    """

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        frequencies, self._scale = rope_frequencies(config, head_dim)
        self._frequencies = frequencies.to(device)
        self.device = device

    def tables(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, 1, D / 2] in `dtype`, for int64 `positions_T`; angles in float32."""
        angles = (positions_T.float()[:, None] * self._frequencies).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        if self._scale != 1.0:
            cos, sin = cos * self._scale, sin * self._scale
        return cos.to(dtype), sin.to(dtype)


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + D / 2) of queries or keys by the angles of `RotaryEmbedding.tables`."""
    first, second = x_THD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_frequencies(config: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Angular frequencies, float32 [D / 2] on the CPU, and the factor on cos and sin."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    base = 1.0 / config.theta**steps
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
    index = torch.arange(head_dim // 2, dtype=torch.float32, device=base.device)
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
