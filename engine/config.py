"""Settings of the engine process: parsed once by the front end, frozen, sent as msgpack."""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.errors import ConfigError
from engine.log_lines import LogFormat
from engine.model.kv_bytes import IndexDtype

AttentionMode = Literal["sparse", "dense"]
KernelMode = Literal["auto", "cuda", "torch"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the engine process needs. Units stand behind each field."""

    model: str  # path of a model folder
    attention: AttentionMode = "sparse"  # "dense" serves a converted model with full attention
    prefill_attention: AttentionMode = "dense"  # of retrieval heads; "sparse" needs an indexer
    device: str = "auto"  # auto (CUDA if there is one), cpu, cuda, cuda:N
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, else float32
    index_dtype: IndexDtype = "auto"  # of index keys; int8: with a scale per token
    kernels: KernelMode = "auto"  # of attention; auto: kernels where they can be had
    cuda_graphs: bool = True  # record decode steps and replay them; only with CUDA kernels
    kernel_cache: str | None = None  # folder of compiled kernels; None: ~/.cache/rtpurbo/kernels
    log_format: LogFormat = "text"  # of the lines on stdout
    max_model_len: int | None = None  # tokens, prompt + output; None: the model's own limit
    max_num_seqs: int = 32  # sequences computed together
    max_batch_tokens: int = 2048  # tokens in one step, decode first, the rest prefill chunks
    # aim of a step beside which others wait; auto: by the device; None: tokens alone
    max_step_ms: float | Literal["auto"] | None = None
    kv_cache_bytes: int | None = None  # both pools; None: a share of free memory (see memory plan)
    prefix_caching: bool = True
    cache_generated: bool = False  # also share pages of generated tokens
    threads: int | None = None  # CPU threads of torch; None leaves torch's default

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens must be at least max_num_seqs ({self.max_num_seqs}), "
                f"got {self.max_batch_tokens}"
            )
        if isinstance(self.max_step_ms, int | float) and not self.max_step_ms > 0:
            raise ConfigError(f"max_step_ms must be positive, got {self.max_step_ms}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"max_model_len must be at least 2, got {self.max_model_len}")
        if self.kv_cache_bytes is not None and self.kv_cache_bytes < 1:
            raise ConfigError(f"kv_cache_bytes must be positive, got {self.kv_cache_bytes}")
