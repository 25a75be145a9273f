"""Layers of the serving path as attention needs them, the same from step to step.

Shapes: R decode rows, H retrieval heads of a layer, B block-table width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.decode_kernels import DecodeKernels
from engine.model.decoder import Indexer
from engine.model.head_layout import model_heads
from engine.model.kv_cache import KVCache
from engine.model.layer_kernels import LayerKernels
from engine.model.layer_roles import LayerRoles
from engine.model.prefill_kernels import SpanKernels
from kernels.indexer import select_blocks

PrefillMode = Literal["dense", "sparse"]


class BlockSelection(Protocol):
    """The rule by which retrieval heads select; `kernels.indexer.select_blocks` is the one served.

    Other ones are for comparison. Rows whose top_p is 1 keep every block.
    """

    def __call__(
        self, log_mass_RHB: Tensor, top_p_RH: Tensor, context_lens_R: Tensor, block_tokens: int
    ) -> Tensor:
        """Blocks to attend, bool [R, H, B]; arguments as `select_blocks`."""
        ...


class AttentionLayers:
    """What stays the same from step to step: roles, caches and indexers of all layers."""

    def __init__(
        self,
        config: ModelConfig,
        cache: KVCache,
        indexers: Sequence[Indexer | None],
        device: torch.device,
        selections: Sequence[BlockSelection] | None = None,
        prefill_attention: PrefillMode = "dense",
        kernels: DecodeKernels | None = None,
        prefill_kernels: SpanKernels | None = None,
        layer_kernels: LayerKernels | None = None,
    ) -> None:
        """
        Args:
            selections: per layer; None: `select_blocks` in all of them.
            prefill_attention: what retrieval heads with an indexer read for prompt tokens.
            kernels: computes decode rows; gives way to the PyTorch ops where `selections` are set,
                since its own choice of blocks is part of it.
            prefill_kernels: compute prompt tokens; None: the PyTorch ops.
            layer_kernels: those of the decoder; store what it projects.
        """
        self.prefill_attention = prefill_attention
        self.kernels = kernels if selections is None else None
        self.prefill_kernels = prefill_kernels
        self.layer_kernels = layer_kernels
        self.selections = selections or [select_blocks] * config.num_layers
        self.heads = model_heads(config)
        self.roles = [LayerRoles.make(heads, config.group_size, device) for heads in self.heads]
        self.caches = cache.layers
        self.indexers = indexers
        self.block_tokens = cache.block_tokens
        self.scale = config.head_dim**-0.5
        self.window = 0 if config.sparse is None else config.sparse.window_tokens
        self.sinks = 0 if config.sparse is None else config.sparse.sink_tokens
        self.dense_below = 0 if config.sparse is None else config.sparse.dense_below
