"""Config files of every family, read or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError
from engine.model.config import ModelConfig
from engine.model.config_reader import read_config

BASE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def family(name: str) -> dict[str, Any]:
    own = MOE if name == "qwen3_moe" else {}
    return {"architectures": [ARCHITECTURES[name]], "model_type": name, **own}


def read(folder: Path, *drop: str, **changes: Any) -> ModelConfig:
    values = {key: value for key, value in {**BASE, **changes}.items() if key not in drop}
    (folder / "config.json").write_text(json.dumps(values))
    return read_config(folder)


def refusal(folder: Path, *drop: str, **changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder, *drop, **changes)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert "\n" not in message
    return message.removeprefix(f"{folder / 'config.json'}: ")
