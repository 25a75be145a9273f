"""Rotary settings of config.json -> RopeConfig, read as transformers reads them. Torch-free.

Layouts: `rope_theta` beside `rope_scaling` (transformers 4), `rope_parameters` (transformers 5).
"""

from __future__ import annotations

from engine.model.config import RopeConfig
from engine.model.json_object import JsonObject, shown

DEFAULT_THETA = 10000.0
KEYS = frozenset(
    """rope_type type rope_theta factor original_max_position_embeddings low_freq_factor
    high_freq_factor beta_fast beta_slow attention_factor mscale mscale_all_dim truncate
    partial_rotary_factor""".split()
)


def read_rope(config: JsonObject, max_positions: int) -> RopeConfig:
    """Rotary embedding of a model of `max_positions` tokens.

    Raises:
        CheckpointError: one line that names the file and the key.
    """
    theta = config.number("rope_theta", DEFAULT_THETA)
    # Where both layouts are present transformers takes rope_scaling, and passes over an empty one.
    layout = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.section(layout)
    if rope is None:
        return RopeConfig(theta=theta)
    theta = rope.number("rope_theta", theta)
    for key in rope.values:
        if key not in KEYS:
            raise rope.error(shown(key), "is not known and could change what the model computes")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise rope.error("partial_rotary_factor", "must be 1: every dimension is rotated")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=rope.number("factor"))
    if kind == "llama3":
        return _llama3(rope, theta, max_positions)
    if kind == "yarn":
        return _yarn(rope, theta, max_positions)
    raise rope.error("rope_type", f"is {shown(kind)}; supported: default, linear, llama3, yarn")


def _llama3(rope: JsonObject, theta: float, max_positions: int) -> RopeConfig:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.error("high_freq_factor", "must be larger than low_freq_factor")
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=rope.number("factor"),
        original_max_position=rope.integer("original_max_position_embeddings", max_positions),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: JsonObject, theta: float, max_positions: int) -> RopeConfig:
    if theta == 1:
        raise rope.error("rope_theta", "must not be 1 under yarn, which divides by its logarithm")
    original = rope.integer("original_max_position_embeddings", max_positions)
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=rope.number("factor", max_positions / original),
        original_max_position=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.boolean("truncate", True),
    )
