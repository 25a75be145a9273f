"""Sparse sections of config.json: "rtpurbo" (design section 4) and RTP-LLM's headwise_config.

Torch-free.
"""

from __future__ import annotations

from typing import Any

from engine.model.config import ModelConfig, SparseAttentionConfig
from engine.model.json_object import JsonObject, shown

FORMAT_VERSION = 1
KEYS = frozenset(
    """format_version retrieval_heads window_tokens sink_tokens index_dim index_scope
    index_age_bias block_tokens top_p dense_below calibration""".split()
)
MAX_INDEX_DIM = 1024
MAX_BLOCK_TOKENS = 4096
HEADWISE_BLOCK_TOKENS = 64

Heads = tuple[tuple[int, ...], ...]


def read_sparse_section(config: JsonObject, model: ModelConfig) -> SparseAttentionConfig | None:
    """The sparse section of a config.json, None for a plain dense model.

    A folder that has both was converted here after it had been published there: "rtpurbo" counts.

    Raises:
        CheckpointError: one line that names the file and the key.
    """
    if (section := config.section("rtpurbo")) is not None:
        return _rtpurbo(section, model)
    if (section := config.section("headwise_config")) is not None:
        return _headwise(section, model)
    return None


def _rtpurbo(section: JsonObject, model: ModelConfig) -> SparseAttentionConfig:
    section.integer("format_version", minimum=FORMAT_VERSION, maximum=FORMAT_VERSION)
    _refuse_unknown(section, KEYS)
    heads = _retrieval_heads(section, model)
    block = section.integer("block_tokens", 64, maximum=MAX_BLOCK_TOKENS)
    if block & (block - 1):
        raise section.error("block_tokens", "must be a power of two")
    scope = section.values.get("index_scope", "query_head")
    if scope not in ("query_head", "kv_head"):
        raise section.error("index_scope", 'must be "query_head" or "kv_head"')
    without_indexer = section.values.get("index_dim", 16) is None  # null says so; missing does not
    age_bias = section.boolean("index_age_bias", False)
    if age_bias and without_indexer:
        raise section.error("index_age_bias", "needs an indexer, but index_dim is null")
    return SparseAttentionConfig(
        retrieval_heads=heads,
        window_tokens=section.integer("window_tokens", 8192),
        sink_tokens=section.integer("sink_tokens", 4, minimum=0, maximum=block),
        index_dim=None if without_indexer else section.integer("index_dim", 16, 1, MAX_INDEX_DIM),
        index_scope=scope,
        index_age_bias=age_bias,
        block_tokens=block,
        top_p=_top_p(section, heads),
        dense_below=section.integer("dense_below", 0, minimum=0),
    )


def _headwise(section: JsonObject, model: ModelConfig) -> SparseAttentionConfig:
    """RTP-LLM's map: 0/1 per query head under the keys "0", "1", ...; no indexer.

    A layer that is not listed keeps every head, as there. Two differences are on purpose:

    - `swa_token_num` counts the query's own token, as the window does everywhere here (m - j <
      window). Their prefill passes it as `window_left` (m - j <= window), one key more.
    - `seqlen_threshold` is where they switch from dense to headwise prefill. Here every token
      follows the head map, so that its keys can leave the cache; up to the window's length the two
      agree exactly. It is kept as `dense_below`, and decode is dense without an indexer anyway.
    """
    layers = [str(layer) for layer in range(model.num_layers)]
    _refuse_unknown(section, {"sink_token_num", "swa_token_num", "seqlen_threshold", *layers})
    heads = tuple(_flagged(section, layer, model.num_heads) for layer in layers)
    return SparseAttentionConfig(
        retrieval_heads=heads,
        window_tokens=section.integer("swa_token_num", 8192),
        sink_tokens=section.integer("sink_token_num", 4, 0, HEADWISE_BLOCK_TOKENS),
        index_dim=None,
        block_tokens=HEADWISE_BLOCK_TOKENS,
        top_p=tuple((1.0,) * len(layer) for layer in heads),
        dense_below=section.integer("seqlen_threshold", 16384, minimum=0),
    )


def _flagged(section: JsonObject, layer: str, num_heads: int) -> tuple[int, ...]:
    flags = section.values.get(layer, [1] * num_heads)
    sane = isinstance(flags, list) and all(type(flag) is int and flag in (0, 1) for flag in flags)
    if not sane or len(flags) != num_heads:
        raise section.error(layer, f"must list 0 or 1 for each of {num_heads} query heads")
    return tuple(head for head, flag in enumerate(flags) if flag)


def _refuse_unknown(section: JsonObject, known: frozenset[str] | set[str]) -> None:
    if unknown := sorted(set(section.values) - known):
        raise section.error(shown(unknown[0]), "is not known")


def _retrieval_heads(section: JsonObject, model: ModelConfig) -> Heads:
    layers = section.get("retrieval_heads")
    if not isinstance(layers, list) or len(layers) != model.num_layers:
        raise section.error("retrieval_heads", f"must list heads for {model.num_layers} layers")
    for layer, heads in enumerate(layers):
        in_range = isinstance(heads, list) and all(
            type(head) is int and 0 <= head < model.num_heads for head in heads
        )
        if not in_range or heads != sorted(set(heads)):
            raise section.error(
                f"retrieval_heads[{layer}]",
                f"must be ascending query heads from 0 to {model.num_heads - 1}",
            )
    return tuple(tuple(heads) for heads in layers)


def _top_p(section: JsonObject, heads: Heads) -> tuple[tuple[float, ...], ...]:
    """One value for all, a flat list over all retrieval heads, or a list per layer."""
    value: Any = section.values.get("top_p", 0.9)
    sizes = [len(layer) for layer in heads]
    if isinstance(value, list) and value and all(isinstance(layer, list) for layer in value):
        if [len(layer) for layer in value] != sizes:
            raise section.error("top_p", "must have the shape of retrieval_heads")
        value = [item for layer in value for item in layer]
    given = value if isinstance(value, list) else [value]
    if any(type(item) not in (int, float) or not 0 < item <= 1 for item in given):
        raise section.error("top_p", "must be numbers above 0 and up to 1")
    flat = value if isinstance(value, list) else [value] * sum(sizes)
    if len(flat) != sum(sizes):
        raise section.error("top_p", f"must have one value per retrieval head ({sum(sizes)})")
    values = iter(flat)
    return tuple(tuple(float(next(values)) for _ in range(size)) for size in sizes)
