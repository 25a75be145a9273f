"""What `rtpurbo convert` is asked to make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from conversion.calibration import needle_lengths
from conversion.distil_options import DistilOptions
from conversion.errors import ConversionError
from conversion.fit_options import FitOptions
from conversion.head_roles import Granularity, HeadRule
from engine.model.config import IndexScope, SparseAttentionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What to make. Sizes are in tokens."""

    data: Path | None = None  # text file or folder; None: Python sources of this environment
    heads: Path | None = None  # JSON with a list retrieval_heads: these, and no rule
    heads_share: float = 0.15  # of all query heads (or KV heads, by granularity)
    heads_mass: float | None = None  # instead: share of the summed needle scores
    heads_granularity: Granularity = "query_head"  # kv_head: all query heads of the best KV heads
    max_kv_heads: int | None = None  # keep heads of so many KV heads only
    causal_check: bool = False  # choose by the retrieval that is lost, see conversion.causal_check
    window_tokens: int = 8192
    sink_tokens: int = 4
    index_dim: int = 16
    index_scope: IndexScope = "query_head"
    index_age_bias: bool = True  # a bias for ages in the index of every head
    block_tokens: int = 64
    top_p: float = 0.9
    dense_below: int = 0  # context length below which retrieval heads decode densely
    documents: int = 4  # for the needle scores, of each length
    document_tokens: int = 8192  # of the longest and of the fit's; at most the model's limit
    needle_lengths: tuple[int, ...] = ()  # of documents for the scores; (): see calibration
    fit: FitOptions = field(default_factory=FitOptions)
    distil: DistilOptions | None = None  # stage 2; None leaves the weights as they are
    seed: int = 0
    device: str = "cpu"  # cpu, cuda (one per process under torchrun) or cuda:N

    def __post_init__(self) -> None:
        self.rule()
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConversionError(f"device {self.device} is not there")
        if not 0 < self.top_p <= 1:
            raise ConversionError(f"top_p must be in (0, 1], got {self.top_p}")
        positive = ("window_tokens", "index_dim", "block_tokens", "documents", "document_tokens")
        for name, least in (*((name, 1) for name in positive), ("dense_below", 0)):
            if getattr(self, name) < least:
                raise ConversionError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.heads is not None and self.causal_check:
            raise ConversionError("causal_check chooses heads, so heads cannot be given")
        if self.fit.age_tokens and not self.index_age_bias:
            raise ConversionError("age_tokens needs index_age_bias: without it no age has a bias")
        if any(length < 1 for length in self.needle_lengths):
            raise ConversionError(f"needle_lengths must be at least 1, got {self.needle_lengths}")
        if self.block_tokens & (self.block_tokens - 1):
            raise ConversionError(f"block_tokens must be a power of two, got {self.block_tokens}")
        if not 0 <= self.sink_tokens <= self.block_tokens:
            raise ConversionError(
                f"sink_tokens must be from 0 to block_tokens, got {self.sink_tokens}"
            )

    def rule(self) -> HeadRule:
        """How heads are chosen; raises ConversionError."""
        return HeadRule(
            self.heads_share, self.heads_mass, self.max_kv_heads, self.heads_granularity
        )

    def lengths(self, limit: int) -> tuple[int, ...]:
        """Lengths of calibration documents for a model of `limit` positions, ascending."""
        if not self.needle_lengths:
            return needle_lengths(min(self.document_tokens, limit))
        return tuple(sorted({min(length, limit) for length in self.needle_lengths}))

    def section(self, heads: Sequence[Sequence[int]]) -> SparseAttentionConfig:
        """What config.json is to say of a model with these retrieval heads, given by layer; all
        have the same top_p."""
        return SparseAttentionConfig(
            retrieval_heads=tuple(tuple(layer) for layer in heads),
            window_tokens=self.window_tokens,
            sink_tokens=self.sink_tokens,
            index_dim=self.index_dim,
            index_scope=self.index_scope,
            index_age_bias=self.index_age_bias,
            block_tokens=self.block_tokens,
            top_p=tuple(tuple(self.top_p for _ in layer) for layer in heads),
            dense_below=self.dense_below,
        )
