"""config.json -> ModelConfig, strictly: what could change the maths and is not known is refused.

Both layouts of rotary settings are read: `rope_theta` + `rope_scaling`, and `rope_parameters`.
Torch-free; nothing of the folder is imported or executed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.model.config import Family, ModelConfig, MoeConfig, RopeConfig
from engine.model.sparse_section import read_headwise_section, read_rtpurbo_section

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# Keys that do not change the logits of a causal language model at inference.
HARMLESS = frozenset(
    """_name_or_path add_cross_attention architectures attention_dropout bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range
    is_decoder is_encoder_decoder label2id length_penalty max_length max_window_layers
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_router_logits
    output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    use_bfloat16 use_cache attn_implementation _attn_implementation""".split()
)
# Keys with one value that this decoder computes; any other value is refused.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, 1.0, None),
    "use_sliding_window": (False, None),
    "use_qk_norm": (True, None),
}
KNOWN = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings
    attention_bias mlp_bias rope_theta rope_scaling rope_parameters sliding_window layer_types
    num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob
    mlp_only_layers decoder_sparse_step rtpurbo headwise_config""".split()
)


def read_config(folder: Path) -> ModelConfig:
    """Describe the model in `folder`.

    Raises:
        CheckpointError: one line that names the file and the key.
    """
    path = folder / "config.json"
    reader = _Reader(path, read_json_object(path))
    return _model_config(reader, folder)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder; raises CheckpointError with one line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


class _Reader:
    """Typed access to the keys of config.json; every failure names file and key."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or value < minimum:
            raise self.error(f"{key} must be a whole number of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise self.error(f"{key} must be a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.error(f"{key} must be true or false")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(item) is not int or item < 0 for item in ids):
            raise self.error(f"{key} must be a token id or a list of token ids")
        return tuple(ids)


def _model_config(reader: _Reader, folder: Path) -> ModelConfig:
    family = _family(reader)
    _refuse_unknown(reader)
    heads = reader.integer("num_attention_heads")
    kv_heads = reader.integer("num_key_value_heads", heads)
    hidden = reader.integer("hidden_size")
    if heads % kv_heads:
        raise reader.error("num_attention_heads must be a multiple of num_key_value_heads")
    if reader.values.get("head_dim") is None and hidden % heads:
        raise reader.error("head_dim is missing and hidden_size is no multiple of the heads")
    head_dim = reader.integer("head_dim", hidden // heads, minimum=2)
    if head_dim % 2:
        raise reader.error("head_dim must be even")
    layers = reader.integer("num_hidden_layers")
    max_positions = reader.integer("max_position_embeddings")
    _refuse_windows(reader, max_positions)
    attention_bias = reader.boolean("attention_bias", False)
    moe = _moe(reader, layers) if family == "qwen3_moe" else None
    config = ModelConfig(
        family=family,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        max_position_embeddings=max_positions,
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=family != "qwen2" and attention_bias,
        mlp_bias=family == "llama" and reader.boolean("mlp_bias", False),
        rope=_rope(reader, max_positions),
        moe=moe,
        bos_token_id=next(iter(reader.ids("bos_token_id")), None),
        eos_token_ids=_eos_ids(reader, folder),
    )
    return _with_sparse_section(reader, config)


def _with_sparse_section(reader: _Reader, config: ModelConfig) -> ModelConfig:
    if (section := reader.values.get("rtpurbo")) is not None:
        return replace(config, sparse=read_rtpurbo_section(reader.path, section, config))
    if (section := reader.values.get("headwise_config")) is not None:
        return replace(config, sparse=read_headwise_section(reader.path, section, config))
    return config


def _family(reader: _Reader) -> Family:
    names = reader.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        shown = names if isinstance(names, list) and len(str(names)) < 80 else "none that is known"
        raise reader.error(f"architectures is {shown}; supported: {known}")
    return FAMILIES[names[0]]


def _refuse_unknown(reader: _Reader) -> None:
    for key, value in reader.values.items():
        if key in FIXED:
            if value not in FIXED[key]:
                raise reader.error(f"{key} is {value!r}; this decoder supports {FIXED[key][0]!r}")
        elif key not in KNOWN and key not in HARMLESS and value not in (None, False):
            raise reader.error(f"key {key!r} is not known and could change what the model computes")


def _refuse_windows(reader: _Reader, max_positions: int) -> None:
    """A model that was trained with sliding windows is not a full-attention model."""
    kinds = reader.values.get("layer_types")
    if kinds is not None and any(kind != "full_attention" for kind in kinds):
        raise reader.error("layer_types has layers without full attention")
    window = reader.values.get("sliding_window")
    windowed = window is not None and window < max_positions
    if windowed and reader.values.get("use_sliding_window") is not False:
        raise reader.error(f"sliding_window {window} is below max_position_embeddings")


def _moe(reader: _Reader, layers: int) -> MoeConfig:
    step = reader.integer("decoder_sparse_step", 1)
    only = reader.values.get("mlp_only_layers") or []
    dense = tuple(i for i in range(layers) if i in only or (i + 1) % step)
    experts = reader.integer("num_experts", reader.values.get("num_local_experts"))
    per_token = reader.integer("num_experts_per_tok")
    if per_token > experts:
        raise reader.error("num_experts_per_tok is larger than num_experts")
    return MoeConfig(
        num_experts=experts,
        experts_per_token=per_token,
        intermediate_size=reader.integer("moe_intermediate_size"),
        normalize_weights=reader.boolean("norm_topk_prob", False),
        dense_layers=dense,
    )


def _rope(reader: _Reader, max_positions: int) -> RopeConfig:
    scaling = reader.values.get("rope_parameters") or reader.values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise reader.error("rope_parameters must be an object")
    inner = _Reader(reader.path, {"rope_theta": reader.values.get("rope_theta"), **scaling})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = inner.number("rope_theta", 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind not in ("linear", "llama3", "yarn"):
        raise reader.error(f"rope type {kind!r} is not supported (default, linear, llama3, yarn)")
    original = inner.integer("original_max_position_embeddings", max_positions)
    optional = {
        key: inner.number(key)
        for key in ("attention_factor", "mscale", "mscale_all_dim")
        if scaling.get(key) is not None
    }
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=inner.number("factor"),
        original_max_position=original,
        low_freq_factor=inner.number("low_freq_factor", 1.0),
        high_freq_factor=inner.number("high_freq_factor", 4.0),
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        truncate=inner.boolean("truncate", True),
        **optional,
    )


def _eos_ids(reader: _Reader, folder: Path) -> tuple[int, ...]:
    """Ids from config.json and, as generation uses them, from generation_config.json."""
    ids = reader.ids("eos_token_id")
    path = folder / "generation_config.json"
    if path.exists():
        ids += _Reader(path, read_json_object(path)).ids("eos_token_id")
    return tuple(dict.fromkeys(ids))
