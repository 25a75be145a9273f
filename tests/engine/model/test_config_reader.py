"""config.json is read as transformers reads it, and what is not understood is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointError
from engine.model.config import RopeConfig
from engine.model.config_reader import FIXED, HARMLESS, KNOWN, REFUSED, read_config
from engine.model.rope_reader import KEYS as ROPE_KEYS
from tests.engine.model.config_case import ARCHITECTURES, family, read, refusal

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_family_has_its_own_parts(name: str, tmp_path: Path) -> None:
    config = read(tmp_path, **family(name), attention_bias=True, mlp_bias=True)
    assert config.family == name
    assert config.qk_norm == (name in ("qwen3", "qwen3_moe"))
    assert config.qkv_bias == (name != "mistral")
    assert config.o_bias == (name in ("llama", "qwen3", "qwen3_moe"))
    assert config.mlp_bias == (name == "llama")
    assert (config.moe is not None) == (name == "qwen3_moe")


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["Qwen3ForCausalLM", "LlamaForCausalLM"]},
        {"architectures": None},
        {"architectures": [["Qwen3ForCausalLM"]]},
        {"model_type": "llama"},
        {"hidden_act": "gelu"},
        {"pretraining_tp": 2},
        {"partial_rotary_factor": 0.5},
        {"use_sliding_window": True},
        {"attn_logit_softcapping": 50.0},
        {"quantization_config": {"quant_method": "fp8"}},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        {"residual_multiplier": 0.22},
        {"logit_scale": 0},
        {"pruned_heads": {"0": [1]}},
        {"is_encoder_decoder": True},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"layer_types": 3},
        {"vocab_size": None},
        {"vocab_size": "320"},
        {"vocab_size": True},
        {"hidden_size": 0},
        {"num_hidden_layers": 10**12},
        {"num_key_value_heads": 4},
        {"head_dim": 15},
        {"rms_norm_eps": -1e-6},
        {"tie_word_embeddings": "yes"},
        {"eos_token_id": "</s>"},
        {"eos_token_id": [1, -1]},
    ],
    ids=lambda change: next(f"{key}={value!r}"[:48] for key, value in change.items()),
)
def test_what_could_change_the_logits_is_refused_by_name(
    change: dict[str, Any], tmp_path: Path
) -> None:
    (key,) = change
    assert key in refusal(tmp_path, **change).split(" ")[0]


def test_harmless_and_inert_keys_are_passed_over(tmp_path: Path) -> None:
    plain = read(tmp_path)
    assert read(tmp_path, **dict.fromkeys(HARMLESS, "anything")) == plain
    assert read(tmp_path, from_the_future=None, new_switch=False) == plain
    assert read(tmp_path, sliding_window=64, max_window_layers=1) == plain  # off in Qwen
    assert read(tmp_path, layer_types=["full_attention"] * 3) == plain


def test_mistral_sliding_window_counts_only_below_the_context_length(tmp_path: Path) -> None:
    full = read(tmp_path, **family("mistral"), sliding_window=None)
    assert read(tmp_path, **family("mistral"), sliding_window=512) == full
    # Mistral has no such switch: transformers applies the window whatever this key says.
    message = refusal(tmp_path, **family("mistral"), sliding_window=511, use_sliding_window=False)
    assert message.startswith("sliding_window is 511")


def test_missing_keys_take_the_default_that_transformers_takes(tmp_path: Path) -> None:
    config = read(tmp_path, "head_dim")
    assert config.head_dim == 128  # Qwen3's own; the other families divide
    assert read(tmp_path, "head_dim", **family("llama")).head_dim == 8
    assert (config.rms_norm_eps, config.rope) == (1e-6, RopeConfig(theta=10000.0))
    assert not config.tie_word_embeddings
    assert read(tmp_path, "num_key_value_heads", **family("llama")).num_kv_heads == 6
    assert "num_key_value_heads is missing" in refusal(tmp_path, "num_key_value_heads")
    assert "head_dim is missing" in refusal(tmp_path, "head_dim", **family("llama"), hidden_size=50)


@pytest.mark.parametrize("name", ["default", "linear", "llama3", "yarn"])
def test_both_layouts_of_rotary_settings_say_the_same(name: str, tmp_path: Path) -> None:
    extras: dict[str, dict[str, Any]] = {
        "llama3": {**LLAMA3},
        "yarn": {"original_max_position_embeddings": 128},
    }
    extra = extras.get(name, {})
    scaling = {"factor": 4.0, **extra} if name != "default" else {}
    new = read(tmp_path, rope_parameters={"rope_type": name, "rope_theta": 5e5, **scaling})
    assert (new.rope.kind, new.rope.theta) == (name, 5e5)
    assert read(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": name, **scaling}) == new
    assert read(tmp_path, rope_theta=5e5, rope_scaling={"type": name, **scaling}) == new


def test_yarn_without_factor_takes_the_ratio_of_the_lengths(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}
    assert read(tmp_path, rope_parameters=rope).rope.factor == 4.0


@pytest.mark.parametrize(
    ("rope", "key"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type"),
        ({"type": "mrope"}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}, "mrope_section"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({"rope_type": "llama3", "factor": 8.0, **LLAMA3, "low_freq_factor": 4.0}, "high_freq"),
        ({"rope_type": "yarn", "factor": 8.0, "rope_theta": 1}, "rope_theta"),
        ("yarn", "rope_parameters must be an object"),
    ],
)
def test_other_rotary_settings_are_refused(rope: Any, key: str, tmp_path: Path) -> None:
    assert key in refusal(tmp_path, rope_parameters=rope)


def test_moe_layers_follow_both_lists(tmp_path: Path) -> None:
    moe = {**family("qwen3_moe"), "mlp_only_layers": [1], "decoder_sparse_step": 2}
    config = read(tmp_path, **moe, num_hidden_layers=5)
    assert config.moe is not None
    assert config.moe.dense_layers == (0, 1, 2, 4)
    renamed = {**moe, "num_local_experts": 6}  # transformers 5 writes this name
    assert read(tmp_path, "num_experts", **renamed, num_hidden_layers=5) == config
    assert "num_experts_per_tok" in refusal(tmp_path, **{**moe, "num_experts_per_tok": 7})
    assert "num_local_experts is missing" in refusal(tmp_path, "num_experts", **moe)
    assert "mlp_only_layers" in refusal(tmp_path, **{**moe, "mlp_only_layers": [-1]})


def test_an_eos_id_without_a_logit_is_left_out(tmp_path: Path) -> None:
    """Masking it before min_tokens indexed past the logits, and the engine died."""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [319, 320]}')
    assert read(tmp_path, eos_token_id=[400, 2]).eos_token_ids == (2, 319)


def test_eos_ids_come_from_both_files_once_each(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2], "top_p": 0.8}')
    config = read(tmp_path, eos_token_id=2, bos_token_id=1)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 7))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "not readable as JSON"),
        (b'{"rope_theta": NaN}', "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git-LFS pointer"),
    ],
    ids=["empty", "cut", "list", "not UTF-8", "NaN", "deep", "LFS"],
)
def test_an_unreadable_file_is_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_folder_without_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_config(tmp_path)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["yarn", "llama3", "full_attention", "kv_head"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=3) | st.sampled_from(sorted(ROPE_KEYS)), inner, max_size=4
        )
    ),
    max_leaves=8,
)
ANY_KEY = st.sampled_from(sorted(KNOWN | HARMLESS | set(FIXED) | set(REFUSED)))


@given(
    name=st.sampled_from(sorted(ARCHITECTURES)),
    changes=st.dictionaries(ANY_KEY | st.text(max_size=5), JSON_VALUES, max_size=3),
)
def test_any_json_is_a_config_or_one_clear_line(
    name: str, changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        config = read(folder, **{**family(name), **changes})
    except CheckpointError as error:
        # Accepted or refused: both are right here, but a refusal is one line that names the file.
        assert str(error).startswith(str(folder / "config.json"))  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 400  # noqa: PT017
    else:
        assert config.num_heads % config.num_kv_heads == 0
