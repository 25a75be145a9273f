"""Writes a tiny random sparse Qwen3 folder, laid out as a user would have it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

# Of KV cache: room for every test. The default is 1 GiB, which each engine touches when it starts.
CACHE_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """Shape of the folder. `retrieval_heads` as in config.json; None writes a dense model."""

    retrieval_heads: tuple[tuple[int, ...], ...] | None = ((0, 3), (), (1,))
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    hidden: int = 32
    intermediate: int = 48
    vocab: int = 61
    window: int = 24
    sinks: int = 4
    block: int = 8
    index_dim: int = 4
    index_scope: Literal["query_head", "kv_head"] = "query_head"
    index_age_bias: bool = False
    top_p: float = 0.6
    dense_below: int = 0
    max_position: int = 512
    eos: int = 60
    seed: int = 0

    @property
    def layers(self) -> int:
        return 3 if self.retrieval_heads is None else len(self.retrieval_heads)

    def full_kv(self, layer: int) -> list[int]:
        """KV heads with a retrieval head in their group, ascending."""
        heads = (
            range(self.num_heads) if self.retrieval_heads is None else self.retrieval_heads[layer]
        )
        return sorted({head * self.num_kv_heads // self.num_heads for head in heads})

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": self.max_position,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "eos_token_id": self.eos,
            "torch_dtype": "float32",
        }
        if self.retrieval_heads is not None:
            config["rtpurbo"] = {
                "format_version": 1,
                "retrieval_heads": [list(heads) for heads in self.retrieval_heads],
                "window_tokens": self.window,
                "sink_tokens": self.sinks,
                "index_dim": self.index_dim,
                "index_scope": self.index_scope,
                "index_age_bias": self.index_age_bias,
                "block_tokens": self.block,
                "top_p": self.top_p,
                "dense_below": self.dense_below,
                "calibration": {},
            }
        return config


def write_checkpoint(folder: Path, model: TinyModel) -> Path:
    """Random weights, large enough that logits are far apart and index masses differ widely.

    With `index_age_bias` the others are what they are without.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(model.seed)
    of_biases = torch.Generator().manual_seed(model.seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    spread = model.hidden**-0.5
    weights = {
        "model.embed_tokens.weight": normal(model.vocab, model.hidden),
        "model.norm.weight": 1 + normal(model.hidden, scale=0.1),
        "lm_head.weight": normal(model.vocab, model.hidden, scale=2 * spread),
    }
    indexers = {}
    for i in range(model.layers):
        layer, attn = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        weights |= {
            f"{layer}.input_layernorm.weight": 1 + normal(model.hidden, scale=0.1),
            f"{layer}.post_attention_layernorm.weight": 1 + normal(model.hidden, scale=0.1),
            f"{attn}.q_proj.weight": normal(q_width, model.hidden, scale=spread),
            f"{attn}.k_proj.weight": normal(kv_width, model.hidden, scale=spread),
            f"{attn}.v_proj.weight": normal(kv_width, model.hidden, scale=2 * spread),
            f"{attn}.o_proj.weight": normal(model.hidden, q_width, scale=2 * q_width**-0.5),
            f"{attn}.q_norm.weight": 2 + normal(model.head_dim, scale=0.2),
            f"{attn}.k_norm.weight": 2 + normal(model.head_dim, scale=0.2),
            f"{layer}.mlp.gate_proj.weight": normal(model.intermediate, model.hidden, scale=spread),
            f"{layer}.mlp.up_proj.weight": normal(model.intermediate, model.hidden, scale=spread),
            f"{layer}.mlp.down_proj.weight": normal(model.hidden, model.intermediate, scale=spread),
        }
        heads = () if model.retrieval_heads is None else model.retrieval_heads[i]
        if heads:
            keys = len(heads) if model.index_scope == "query_head" else len(model.full_kv(i))
            shape, size = (model.index_dim, model.head_dim), model.head_dim**-0.5
            indexers[f"{attn}.indexer.q_proj.weight"] = normal(len(heads), *shape, scale=size)
            indexers[f"{attn}.indexer.k_proj.weight"] = normal(keys, *shape, scale=size)
        if heads and model.index_age_bias:
            bias = torch.randn(len(heads), 16, generator=of_biases)
            indexers[f"{attn}.indexer.age_bias"] = 3 * bias
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if indexers:
        save_file(indexers, folder / "indexer.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(model.config()))
    return folder
