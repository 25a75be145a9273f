"""A folder of random weights in the shapes of a large model, for figures that need no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.attention_layer import (
    BLOCK,
    DIM,
    HEADS,
    INDEX_DIM,
    KV_HEADS,
    RETRIEVAL,
    SINKS,
    TOP_P,
    WINDOW,
)
from engine.model.config_reader import read_config
from engine.model.weight_names import weight_rules

HIDDEN = 2048
INTERMEDIATE = 6144  # the eight experts of 768 that a token of Qwen3-30B-A3B takes, as one MLP


def layer_shapes(layers: int, max_position: int) -> dict[str, Any]:
    """`config.json` of a few layers of Qwen3-30B-A3B, converted; see `benchmarks.attention_layer`.

    Args:
        max_position: longest context, tokens.
    """
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "vocab_size": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": max_position,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
        "rtpurbo": {
            "format_version": 1,
            "retrieval_heads": [list(RETRIEVAL)] * layers,
            "window_tokens": WINDOW,
            "sink_tokens": SINKS,
            "index_dim": INDEX_DIM,
            "index_scope": "query_head",
            "block_tokens": BLOCK,
            "top_p": TOP_P,
            "dense_below": 0,
            "calibration": {},
        },
    }


def write_random_model(folder: Path, config: dict[str, Any], device: str = "cpu") -> Path:
    """The folder with weights of variance 1 / inputs, bfloat16; norms are 1. Same weights again on
    the same device."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        return values.mul_(shape[-1] ** -0.5).cpu()

    model = read_config(folder)
    weights = {
        name: random(*shape) if len(shape) > 1 else torch.ones(shape, dtype=torch.bfloat16)
        for rule in weight_rules(model)
        for name, shape in rule.sources
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if model.sparse is not None and model.sparse.index_dim is not None:
        index = {
            f"model.layers.{layer}.self_attn.indexer.{side}_proj.weight": random(
                len(heads), model.sparse.index_dim, model.head_dim
            )
            for layer, heads in enumerate(model.sparse.retrieval_heads)
            if heads
            for side in ("q", "k")
        }
        save_file(index, folder / "indexer.safetensors", metadata={"format": "pt"})
    return folder
