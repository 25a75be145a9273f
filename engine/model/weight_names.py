"""The one table between our parameters and the names in Hugging Face checkpoints.

A parameter of ours is one or several stored tensors, joined along the first dimension (fused
projections) or stacked (experts). The table is a pure function of ModelConfig and reversible.
Torch-free, so that a folder is checked before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from engine.model.config import ModelConfig

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # buffers that old checkpoints carry


@dataclass(frozen=True, slots=True)
class WeightRule:
    """How one of our parameters is stored.

    `sources` are (stored name, shape) in order. "cat" joins them along dimension 0; "experts" reads
    them expert by expert, `per_expert` of them each, joined along dimension 0 and then stacked.
    """

    target: str
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    layout: Literal["cat", "experts"] = "cat"
    per_expert: int = 1


def weight_rules(config: ModelConfig) -> Iterator[WeightRule]:
    """Every parameter of `Decoder`, in order."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield _plain("embedding.weight", "model.embed_tokens.weight", (vocab, hidden))
    for layer in range(config.num_layers):
        yield from _layer_rules(config, layer)
    yield _plain("final_norm.weight", "model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        yield _plain("lm_head.weight", "lm_head.weight", (vocab, hidden))


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Stored tensors that are known and carry nothing."""
    tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith(IGNORED_SUFFIXES)


def _layer_rules(config: ModelConfig, layer: int) -> Iterator[WeightRule]:
    ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
    hidden, dim = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim
    yield _plain(ours + "input_norm.weight", theirs + "input_layernorm.weight", (hidden,))
    qkv = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
    attention = theirs + "self_attn."
    yield WeightRule(
        ours + "attention.qkv_proj.weight",
        tuple((f"{attention}{name}.weight", (rows, hidden)) for name, rows in qkv),
    )
    if config.qkv_bias:
        yield WeightRule(
            ours + "attention.qkv_proj.bias",
            tuple((f"{attention}{name}.bias", (rows,)) for name, rows in qkv),
        )
    yield _plain(ours + "attention.o_proj.weight", attention + "o_proj.weight", (hidden, q_rows))
    if config.o_bias:
        yield _plain(ours + "attention.o_proj.bias", attention + "o_proj.bias", (hidden,))
    if config.qk_norm:
        norms = tuple((f"{attention}{name}.weight", (dim,)) for name in ("q_norm", "k_norm"))
        yield WeightRule(ours + "attention.qk_norm.weight", norms)
    yield _plain(
        ours + "post_attention_norm.weight", theirs + "post_attention_layernorm.weight", (hidden,)
    )
    if config.moe is None or layer in config.moe.dense_layers:
        yield from _mlp_rules(config, ours + "mlp.", theirs + "mlp.")
    else:
        yield from _expert_rules(config, ours + "mlp.", theirs + "mlp.")


def _mlp_rules(config: ModelConfig, ours: str, theirs: str) -> Iterator[WeightRule]:
    hidden, size = config.hidden_size, config.intermediate_size
    pair = ("gate_proj", "up_proj")
    yield WeightRule(
        ours + "gate_up_proj.weight",
        tuple((f"{theirs}{name}.weight", (size, hidden)) for name in pair),
    )
    yield _plain(ours + "down_proj.weight", theirs + "down_proj.weight", (hidden, size))
    if config.mlp_bias:
        yield WeightRule(
            ours + "gate_up_proj.bias", tuple((f"{theirs}{name}.bias", (size,)) for name in pair)
        )
        yield _plain(ours + "down_proj.bias", theirs + "down_proj.bias", (hidden,))


def _expert_rules(config: ModelConfig, ours: str, theirs: str) -> Iterator[WeightRule]:
    assert config.moe is not None
    hidden, size, count = config.hidden_size, config.moe.intermediate_size, config.moe.num_experts
    yield _plain(ours + "router.weight", theirs + "gate.weight", (count, hidden))
    gate_up = tuple(
        (f"{theirs}experts.{expert}.{name}.weight", (size, hidden))
        for expert in range(count)
        for name in ("gate_proj", "up_proj")
    )
    down = tuple(
        (f"{theirs}experts.{expert}.down_proj.weight", (hidden, size)) for expert in range(count)
    )
    yield WeightRule(ours + "gate_up", gate_up, "experts", 2)
    yield WeightRule(ours + "down", down, "experts", 1)


def _plain(target: str, source: str, shape: tuple[int, ...]) -> WeightRule:
    return WeightRule(target, ((source, shape),))
