"""config.json -> ModelConfig, strictly: what could change the maths and is not known is refused.

Torch-free; nothing of the folder is imported or executed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.model.config import Family, ModelConfig, MoeConfig
from engine.model.json_object import JsonObject, read_json_object, shown
from engine.model.rope_reader import read_rope
from engine.model.sparse_section import read_sparse_section

FAMILIES: dict[str, Family] = {  # the values are transformers' model_type, too
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# Keys that this file and its helpers read.
KNOWN = frozenset(
    """architectures model_type bos_token_id eos_token_id
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings
    attention_bias mlp_bias rope_theta rope_scaling rope_parameters
    sliding_window use_sliding_window layer_types
    num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob
    mlp_only_layers decoder_sparse_step rtpurbo headwise_config""".split()
)
# Keys that do not change the logits of a causal language model at inference.
HARMLESS = frozenset(
    """_attn_implementation _attn_implementation_autoset _name_or_path attention_dropout
    attn_implementation bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder label2id
    length_penalty max_length max_window_layers min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_router_logits
    output_scores pad_token_id prefix problem_type remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate router_aux_loss_coef sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache""".split()
)
# Keys with one meaning that this decoder computes; any other value is refused.
FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "hidden_act": ("silu", None),
    "is_encoder_decoder": (False, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "pruned_heads": ({}, None),
}
REFUSED = {
    "auto_map": "asks for code of the folder, which is never executed",
    "quantization_config": "is set; quantised weights are not loaded",
}
MAX_LAYERS = 4096  # far above any model, low enough to refuse a nonsense number at once
MAX_EXPERTS = 65536


def read_config(folder: Path) -> ModelConfig:
    """Describe the model in `folder`.

    A missing or null key takes transformers' default where all five families share it.

    Raises:
        CheckpointError: one line that names the file and the key.
    """
    path = folder / "config.json"
    config = JsonObject(path, read_json_object(path))
    family = _family(config)
    _refuse_unknown(config)
    model = _model(config, family)
    model = replace(model, eos_token_ids=_eos_ids(config, folder, model.vocab_size))
    return replace(model, sparse=read_sparse_section(config, model))


def _family(config: JsonObject) -> Family:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or name not in FAMILIES:
        raise config.error(
            "architectures", f"is {shown(names)}; supported: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[name]
    if config.get("model_type") not in (None, family):
        raise config.error("model_type", f"is {shown(config.get('model_type'))}, not {family!r}")
    return family


def _refuse_unknown(config: JsonObject) -> None:
    for key, value in config.values.items():
        if key in FIXED:
            if value not in FIXED[key]:
                raise config.error(key, f"is {shown(value)}; supported: {FIXED[key][0]!r}")
        elif value is None or value is False or key in KNOWN or key in HARMLESS:
            continue
        elif key in REFUSED:
            raise config.error(key, REFUSED[key])
        else:
            raise config.error(shown(key), "is not known and could change what the model computes")


def _model(config: JsonObject, family: Family) -> ModelConfig:
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    head_dim = _head_dim(config, family, hidden, heads)
    layers = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    max_positions = config.integer("max_position_embeddings")
    _refuse_windows(config, family, max_positions)
    attention_bias = _bias(config, "attention_bias", family in ("llama", "qwen3", "qwen3_moe"))
    return ModelConfig(
        family=family,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(config, family, heads),
        head_dim=head_dim,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        max_position_embeddings=max_positions,
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=_bias(config, "mlp_bias", family == "llama"),
        rope=read_rope(config, max_positions),
        moe=_moe(config, layers) if family == "qwen3_moe" else None,
        bos_token_id=next(iter(config.integers("bos_token_id")), None),
    )


def _head_dim(config: JsonObject, family: Family, hidden: int, heads: int) -> int:
    if config.get("head_dim") is None and family == "qwen3":
        return 128  # Qwen3's own default; the other families derive it
    if config.get("head_dim") is None and hidden % heads:
        raise config.error("head_dim", "is missing and hidden_size is no multiple of the heads")
    head_dim = config.integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise config.error("head_dim", "must be even")
    return head_dim


def _kv_heads(config: JsonObject, family: Family, heads: int) -> int:
    if family != "llama" and "num_key_value_heads" not in config.values:
        raise config.error("num_key_value_heads", "is missing")  # its default differs by family
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", "must divide num_attention_heads")
    return kv_heads


def _bias(config: JsonObject, key: str, family_reads_it: bool) -> bool:
    """A switch of some families only; in others a bias tensor is refused with the weights."""
    return config.boolean(key, False) and family_reads_it


def _refuse_windows(config: JsonObject, family: Family, max_positions: int) -> None:
    """A model that was trained with sliding windows is not a full-attention model."""
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * config.integer("num_hidden_layers"):
        raise config.error("layer_types", "must be full_attention in every layer")
    switchable = family in ("qwen2", "qwen3", "qwen3_moe")
    if switchable and not config.boolean("use_sliding_window", False):
        return  # the published Qwen configurations carry a sliding_window that is off
    if switchable:
        raise config.error("use_sliding_window", "is true; only full attention is supported")
    window = config.integer("sliding_window", max_positions, minimum=0)
    if family == "mistral" and window < max_positions:
        raise config.error("sliding_window", f"is {window}, below max_position_embeddings")


def _moe(config: JsonObject, layers: int) -> MoeConfig:
    key = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    experts = config.integer(key, maximum=MAX_EXPERTS)
    step = config.integer("decoder_sparse_step", 1)
    only = frozenset(config.integers("mlp_only_layers"))
    return MoeConfig(
        num_experts=experts,
        experts_per_token=config.integer("num_experts_per_tok", maximum=experts),
        intermediate_size=config.integer("moe_intermediate_size"),
        normalize_weights=config.boolean("norm_topk_prob", False),
        dense_layers=tuple(i for i in range(layers) if i in only or (i + 1) % step),
    )


def _eos_ids(config: JsonObject, folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Ids from config.json and, as generation uses them, from generation_config.json.

    Ids without a logit, which some tokenizers add, can never be generated and are left out.
    """
    ids = config.integers("eos_token_id")
    path = folder / "generation_config.json"
    if path.exists():
        ids = ids + JsonObject(path, read_json_object(path)).integers("eos_token_id")
    return tuple(token_id for token_id in dict.fromkeys(ids) if token_id < vocab_size)
