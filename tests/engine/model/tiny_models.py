"""Random small checkpoints of every family, written by transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from engine.model.checkpoint import indexer_shapes
from engine.model.config_reader import read_config
from tests.engine.byte_tokenizer import byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"hidden_size": 96},  # no head_dim key: 96 / 6 = 16
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
    },
}
FAMILIES = tuple(OWN)


def make_checkpoint(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    section: dict[str, Any] | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """Write a random checkpoint with tokenizer; `section` adds "rtpurbo" and a random indexer.

    Returns the transformers model, float32 in eval mode.
    """
    values = {**SIZES, **OWN[family], **overrides}
    if family == "qwen2":
        values.pop("head_dim")
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**values)
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than the usual initialisation, so that attention is far from uniform, and
            # norms and biases away from 1 and 0, so that a forgotten one shows.
            spread = 0.3 if parameter.dim() > 1 else 0.1
            centre = 1.0 if "norm" in name else 0.0
            parameter.normal_(centre, spread)
    model.save_pretrained(folder)
    byte_tokenizer(values["vocab_size"]).save(str(folder / "tokenizer.json"))
    if section is not None:
        add_section(folder, section, seed)
    return model  # type: ignore[no-any-return]  # transformers' factories are untyped


def add_section(folder: Path, section: dict[str, Any], seed: int = 0) -> None:
    """Turn a dense folder into a converted one with a random indexer."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rtpurbo"] = {"format_version": 1, **section}
    path.write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    shapes = indexer_shapes(read_config(folder))
    if shapes:
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file(tensors, folder / "indexer.safetensors")
