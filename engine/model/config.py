"""The shape of a model: one frozen description for every supported family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"]
IndexScope = Literal["query_head", "kv_head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. Fields past `theta` belong to the scaling kinds that read them."""

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0  # tokens; llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: derived as transformers does
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Mixture of experts in the layers that are not in `dense_layers`."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalize_weights: bool  # norm_topk_prob
    dense_layers: tuple[int, ...]  # layers with an ordinary MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseAttentionConfig:
    """The "rtpurbo" section of config.json (design section 4), or an imported headwise_config.

    `top_p` has the nesting of `retrieval_heads`: one value per retrieval head. `index_dim` is None
    where the folder has no indexer (headwise_config): retrieval heads then decode densely.
    """

    retrieval_heads: tuple[tuple[int, ...], ...]  # per layer, ascending query-head indices
    window_tokens: int = 8192
    sink_tokens: int = 4
    index_dim: int | None = 16
    index_scope: IndexScope = "query_head"
    index_age_bias: bool = False  # retrieval heads have a bias by age, `kernels.block_age`
    block_tokens: int = 64
    top_p: tuple[tuple[float, ...], ...] = ()
    dense_below: int = 0  # context length in tokens; shorter contexts decode densely


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer with grouped-query attention and a SwiGLU MLP."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int  # query heads per layer
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int  # tokens
    tie_word_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rope: RopeConfig
    moe: MoeConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    sparse: SparseAttentionConfig | None = None  # None: a plain dense model

    @property
    def group_size(self) -> int:
        """Query heads per KV head. Query head h reads KV head h // group_size."""
        return self.num_heads // self.num_kv_heads
