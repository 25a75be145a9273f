"""Sparse sections of config.json: "rtpurbo" (design section 4) and RTP-LLM's headwise_config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.model.config import ModelConfig, SparseAttentionConfig

FORMAT_VERSION = 1
KEYS = frozenset(
    """format_version retrieval_heads window_tokens sink_tokens index_dim index_scope block_tokens
    top_p dense_below calibration""".split()
)


def read_rtpurbo_section(path: Path, section: Any, model: ModelConfig) -> SparseAttentionConfig:
    """Validate the "rtpurbo" section against the model.

    Raises:
        CheckpointError: one line that names the file and the key.
    """

    def fail(message: str) -> CheckpointError:
        return CheckpointError(f"{path}: rtpurbo.{message}")

    def integer(key: str, default: int, minimum: int) -> int:
        value = section.get(key, default)
        if type(value) is not int or value < minimum:
            raise fail(f"{key} must be a whole number of at least {minimum}")
        return value

    if not isinstance(section, dict):
        raise fail("* must be an object")
    if section.get("format_version") != FORMAT_VERSION:
        raise fail(f"format_version must be {FORMAT_VERSION}")
    if unknown := sorted(set(section) - KEYS):
        raise fail(f"{unknown[0]} is not known")
    heads = _heads(section.get("retrieval_heads"), model, fail)
    block = integer("block_tokens", 64, 1)
    if block & (block - 1):
        raise fail("block_tokens must be a power of two")
    sinks = integer("sink_tokens", 4, 0)
    if sinks > block:
        raise fail(f"sink_tokens must be at most block_tokens ({block})")
    index_dim = integer("index_dim", 16, 1) if section.get("index_dim", 16) is not None else None
    scope = section.get("index_scope", "query_head")
    if scope not in ("query_head", "kv_head"):
        raise fail('index_scope must be "query_head" or "kv_head"')
    return SparseAttentionConfig(
        retrieval_heads=heads,
        window_tokens=integer("window_tokens", 8192, 1),
        sink_tokens=sinks,
        index_dim=index_dim,
        index_scope=scope,
        block_tokens=block,
        top_p=_top_p(section.get("top_p", 0.9), heads, fail),
        dense_below=integer("dense_below", 0, 0),
    )


def read_headwise_section(path: Path, section: Any, model: ModelConfig) -> SparseAttentionConfig:
    """Import RTP-LLM's map: 0/1 per query head under the keys "0", "1", …; no indexer.

    A layer that is not listed keeps every head (as there). `seqlen_threshold` is where that system
    switches from dense to headwise prefill; here every prompt follows the head map, which is exact
    below the window, so it is read as `dense_below` and concerns decode only, which is dense
    without an indexer anyway.

    Raises:
        CheckpointError: one line that names the file and the key.
    """

    def fail(message: str) -> CheckpointError:
        return CheckpointError(f"{path}: headwise_config.{message}")

    if not isinstance(section, dict):
        raise fail("* must be an object")
    numbers = {"sink_token_num": 4, "swa_token_num": 8192, "seqlen_threshold": 0}
    for key, default in numbers.items():
        value = section.get(key, default)
        if type(value) is not int or value < 0:
            raise fail(f"{key} must be a whole number")
        numbers[key] = value
    layers = [str(layer) for layer in range(model.num_layers)]
    if unknown := sorted(set(section) - set(numbers) - set(layers)):
        raise fail(f"{unknown[0]} is not known")
    heads = []
    for layer in layers:
        flags = section.get(layer, [1] * model.num_heads)
        if not isinstance(flags, list) or len(flags) != model.num_heads:
            raise fail(f"{layer} must list {model.num_heads} flags")
        if any(flag not in (0, 1) for flag in flags):
            raise fail(f"{layer} must hold 0 and 1 only")
        heads.append(tuple(head for head, flag in enumerate(flags) if flag))
    if not 0 <= numbers["sink_token_num"] <= 64 or numbers["swa_token_num"] < 1:
        raise fail("sink_token_num must be at most 64 and swa_token_num at least 1")
    return SparseAttentionConfig(
        retrieval_heads=tuple(heads),
        window_tokens=numbers["swa_token_num"],
        sink_tokens=numbers["sink_token_num"],
        index_dim=None,
        dense_below=numbers["seqlen_threshold"],
    )


def _heads(value: Any, model: ModelConfig, fail: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or len(value) != model.num_layers:
        raise fail(f"retrieval_heads must list {model.num_layers} layers")
    for layer, heads in enumerate(value):
        in_range = isinstance(heads, list) and all(
            type(head) is int and 0 <= head < model.num_heads for head in heads
        )
        if not in_range or heads != sorted(set(heads)):
            raise fail(f"retrieval_heads[{layer}] must be ascending heads below {model.num_heads}")
    return tuple(tuple(heads) for heads in value)


def _top_p(
    value: Any, heads: tuple[tuple[int, ...], ...], fail: Any
) -> tuple[tuple[float, ...], ...]:
    """One value for all, a flat list over all retrieval heads, or a list per layer."""
    count = sum(len(layer) for layer in heads)
    if isinstance(value, list) and any(isinstance(item, list) for item in value):
        if [len(layer) if isinstance(layer, list) else -1 for layer in value] != [
            len(layer) for layer in heads
        ]:
            raise fail("top_p must have the shape of retrieval_heads")
        flat = [item for layer in value for item in layer]
    else:
        flat = value if isinstance(value, list) else [value] * count
    if len(flat) != count:
        raise fail(f"top_p must have one value per retrieval head ({count})")
    if any(type(item) not in (int, float) or not 0 < item <= 1 for item in flat):
        raise fail("top_p must be in (0, 1]")
    values = iter(flat)
    return tuple(tuple(float(next(values)) for _ in layer) for layer in heads)
