"""Attention in training: some sequences as the dense model, some as the sparse one will be.

A model converts well if few heads carry what lies far away. Training can ask for that: in a share
of the sequences all heads but the chosen ones see a window and the sinks only, in the others every
head sees everything, and the weights learn to be right in both. Shapes:

    B sequences of L tokens, T = B * L, H query heads, N KV heads, D head_dim
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from conversion.errors import ConversionError
from conversion.student_attention import StudentAttention
from conversion.student_layers import StudentLayers
from engine.model.config import ModelConfig, SparseAttentionConfig

Kernel = Literal["flash", "cudnn"]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
FOR_WINDOWS = SDPBackend.EFFICIENT_ATTENTION  # takes the masks that the others may not take


@dataclass(frozen=True, slots=True)
class BatchAttention:
    """Dense causal attention of sequences of equal length, side by side."""

    length: int
    group_size: int

    def attend(
        self,
        layer: int,
        q_pre_THD: Tensor,
        k_pre_TND: Tensor,
        q_THD: Tensor,
        k_TND: Tensor,
        v_TND: Tensor,
    ) -> Tensor:
        q, k, v = (
            x.view(-1, self.length, *x.shape[1:]).transpose(1, 2) for x in (q_THD, k_TND, v_TND)
        )
        k, v = (x.repeat_interleave(self.group_size, 1) for x in (k, v))
        out_BHTD = scaled_dot_product_attention(q, k, v, is_causal=True)
        return out_BHTD.transpose(1, 2).flatten(0, 1)


@dataclass(slots=True)
class TrainingAttention:
    """Implements `engine.model.layers.Attention`: the first `limited` sequences see by head roles.

    `layers` holds the roles; without them no sequence is limited. With `focus`, an index by layer,
    every layer of that leaves its loss (`conversion.embedded.focus`) in `focus_losses`.
    """

    length: int
    group_size: int
    limited: int = 0
    layers: StudentLayers | None = None
    focus: nn.ModuleDict | None = None
    rows_ZR: Tensor | None = None  # of limited sequences, that the focus loss looks at
    focus_losses: list[Tensor] = field(default_factory=list)

    def attend(
        self,
        layer: int,
        q_pre_THD: Tensor,
        k_pre_TND: Tensor,
        q_THD: Tensor,
        k_TND: Tensor,
        v_TND: Tensor,
    ) -> Tensor:
        # The dtype of products, bfloat16 under autocast; norms come in float32.
        given = tuple(x.to(v_TND.dtype) for x in (q_pre_THD, k_pre_TND, q_THD, k_TND, v_TND))
        cut = self.limited * self.length
        parts = []
        if cut:
            assert self.layers is not None
            roles = StudentAttention(self.layers, self.limited, prompt=self.length)
            parts.append(roles.attend(layer, *(x[:cut] for x in given)))
            if self.focus is not None and str(layer) in self.focus:
                loss = self.focus[str(layer)](*(x[:cut] for x in given[:4]), self.rows_ZR)
                self.focus_losses.append(loss)
        if cut < len(q_THD):
            dense = BatchAttention(self.length, self.group_size)
            parts.append(dense.attend(layer, *(x[cut:] for x in given)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def head_roles(
    config: ModelConfig,
    retrieval_heads: Sequence[Sequence[int]],
    window_tokens: int,
    sink_tokens: int,
    device: torch.device,
) -> StudentLayers:
    """Roles for `TrainingAttention`: retrieval heads per layer, a window in tokens for the rest."""
    sparse = SparseAttentionConfig(
        retrieval_heads=tuple(map(tuple, retrieval_heads)),
        window_tokens=window_tokens,
        sink_tokens=sink_tokens,
        index_dim=None,
    )
    roles = replace(config, sparse=sparse)
    layers = StudentLayers(roles, [None] * config.num_layers, device, torch.bfloat16)
    for block in range(3):
        layers.window_mask(block)  # made now: not while a compiler traces
    return layers


def attention_kernels(kernel: Kernel, device: str) -> AbstractContextManager[None]:
    """Inside, attention runs on that kernel on CUDA, and on PyTorch's plain one on a CPU.

    Raises:
        ConversionError: the device is neither, or not there.
    """
    if device == "cpu":
        return sdpa_kernel(SDPBackend.MATH)
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise ConversionError(f"device {device} is not there")
    return sdpa_kernel([BACKENDS[kernel], FOR_WINDOWS], set_priority=True)
