"""Kernels are tried out in the sizes of the model that is served, before they serve it."""

from __future__ import annotations

import torch

from engine.model.config import ModelConfig
from engine.model.kv_bytes import IndexDtype
from kernels._launch import KernelLibrary
from kernels.decode_trial import try_decode
from kernels.layer_trial import LayerKind, try_layers
from kernels.step_trial import try_step
from kernels.trial import on_trial
from kernels.trial_layer import DecodeKind


def try_decode_kernels(
    library: KernelLibrary,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
    index_dtype: IndexDtype,
) -> None:
    """Hold decode attention to known answers, a fraction of a second; its memory is given back.

    Raises:
        TrialError: a kernel gives something else.
        DeviceFaultError: it broke the device for this process.
        KernelError: it could not be launched.
    """
    kind = _decode_kind(model, dtype, block_tokens, index_dtype)
    with on_trial(device):
        try_decode(library, kind, device)


def try_layer_kernels(
    library: KernelLibrary,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
    index_dtype: IndexDtype,
) -> None:
    """The same for the kernels around attention and at the ends of a step."""
    moe = model.moe
    inner_sizes = [model.intermediate_size] + ([] if moe is None else [moe.intermediate_size])
    kind = LayerKind(
        attention=_decode_kind(model, dtype, block_tokens, index_dtype),
        is_normed=model.qk_norm,
        hidden_size=model.hidden_size,
        inner_sizes=tuple(inner_sizes),
        experts=0 if moe is None else moe.num_experts,
        chosen=0 if moe is None else moe.experts_per_token,
        normalise=moe is not None and moe.normalize_weights,
    )
    with on_trial(device):
        try_layers(library, kind, device)
        try_step(library, dtype, block_tokens, model.vocab_size, model.hidden_size, device)


def _decode_kind(
    model: ModelConfig, dtype: torch.dtype, block_tokens: int, index_dtype: IndexDtype
) -> DecodeKind:
    sparse = model.sparse
    return DecodeKind(
        dtype=dtype,
        head_dim=model.head_dim,
        group=model.group_size,
        block_tokens=block_tokens,
        has_local=sparse is not None,
        window=0 if sparse is None else sparse.window_tokens,
        sinks=0 if sparse is None else sparse.sink_tokens,
        index_dim=None if sparse is None else sparse.index_dim,
        index_dtype=torch.int8 if index_dtype == "int8" else dtype,
        has_age_bias=sparse is not None and sparse.index_age_bias,
    )
