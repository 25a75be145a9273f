"""Whether kernels or the PyTorch ops compute: decided once, at start, for attention of decode rows
and of prompt tokens and for what surrounds it. Only kernels that gave known answers on this device
serve.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from engine.config import AttentionMode, KernelMode
from engine.errors import ConfigError
from engine.kernel_trials import try_decode_kernels, try_layer_kernels
from engine.model.config import ModelConfig
from engine.model.kv_bytes import IndexDtype
from engine.model.layer_kernels import LayerKernels
from kernels._args import MAX_BLOCKS
from kernels._build import KernelBuildError, default_cache, find_library
from kernels._launch import KernelError, KernelLibrary
from kernels.device_prefill import DevicePrefill
from kernels.trial import DeviceFaultError, TrialError

logger = logging.getLogger(__name__)


class _UnsupportedError(Exception):
    """Why the kernels cannot serve this model here."""


def choose_kernels(
    mode: KernelMode,
    cache: str | None,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
    max_blocks: int,
    index_dtype: IndexDtype = "auto",
) -> KernelLibrary | None:
    """The compiled kernels, those of decode attention tried out, or None for the PyTorch ops; says
    which, and why, in one line of log.

    Args:
        cache: folder of compiled kernels; None takes the default one.
        model: as it is served.
        block_tokens: tokens of a page.
        max_blocks: pages of the longest context that will be served.
        index_dtype: of index keys.

    Raises:
        ConfigError: mode is "cuda" and the kernels cannot be had or fail, or one broke the device;
            the message says why.
    """
    try:
        if mode == "torch":
            raise _UnsupportedError("the setting kernels says so")
        library = _library(cache, model, device, dtype, block_tokens, max_blocks, index_dtype)
        try_decode_kernels(library, model, device, dtype, block_tokens, index_dtype)
    except DeviceFaultError as fault:
        raise ConfigError(str(fault)) from fault
    except (_UnsupportedError, KernelBuildError, KernelError) as reason:
        if mode == "cuda":
            raise ConfigError(f"kernels cuda is not possible: {reason}") from None
        level = logging.WARNING if isinstance(reason, TrialError) else logging.INFO
        logger.log(level, "decode attention runs on the PyTorch ops: %s", reason)
        return None
    logger.info("decode attention runs on the CUDA kernels")
    return library


def choose_layer_kernels(
    mode: KernelMode,
    library: KernelLibrary,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
    index_dtype: IndexDtype = "auto",
) -> LayerKernels | None:
    """The kernels around attention and at the ends of a step, tried out, or None for the PyTorch
    ops: where there are none for the model's sizes, or, with a warning, where they fail.

    Args:
        library: from `choose_kernels`.

    Raises:
        ConfigError: mode is "cuda" and the kernels fail, or one broke the device; it says which.
    """
    if not LayerKernels.take(model, dtype):
        return None
    try:
        try_layer_kernels(library, model, device, dtype, block_tokens, index_dtype)
    except DeviceFaultError as fault:
        raise ConfigError(str(fault)) from fault
    except KernelError as reason:
        if mode == "cuda":
            raise ConfigError(f"kernels cuda is not possible for layers: {reason}") from None
        logger.warning("layers beside attention run on the PyTorch ops: %s", reason)
        return None
    return LayerKernels(library, model, device)


def choose_prefill(
    mode: KernelMode,
    library: KernelLibrary | None,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
    prefill_attention: AttentionMode,
) -> DevicePrefill | None:
    """The kernels of prompt tokens, compiled and tried out, or None for the PyTorch ops.

    Args:
        library: from `choose_kernels`; without it Triton's are left.
        prefill_attention: of retrieval heads.

    Raises:
        ConfigError: mode is "cuda" and there are no kernels; the message says why.
    """
    try:
        if mode == "torch":
            raise _UnsupportedError("the setting kernels says so")
        if device.type != "cuda":
            raise _UnsupportedError(f"the device is {device}")
        found = _tried_prefill(library, model, device, dtype, block_tokens, prefill_attention)
    except _UnsupportedError as reason:
        if mode == "cuda":
            raise ConfigError(f"kernels cuda is not possible for prefill: {reason}") from None
        logger.info("prefill attention runs on the PyTorch ops: %s", reason)
        return None
    logger.info("prefill attention runs on the %s kernels", found.name)
    return found


def _tried_prefill(
    library: KernelLibrary | None,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
    prefill_attention: AttentionMode,
) -> DevicePrefill:
    index_dim, has_age_bias = None, False
    if prefill_attention == "sparse" and model.sparse is not None:
        index_dim, has_age_bias = model.sparse.index_dim, model.sparse.index_age_bias
    try:
        with torch.cuda.device(device):
            found = DevicePrefill(device, dtype, model.head_dim, block_tokens, library)
            found.try_out(index_dim, has_age_bias=has_age_bias)
    except Exception as error:  # Triton's compilers fail in their own ways on a host without them
        lines = str(error).strip().splitlines() or [""]
        raise _UnsupportedError(f"{type(error).__name__}: {lines[0]}") from error
    return found


def _library(
    cache: str | None,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
    max_blocks: int,
    index_dtype: IndexDtype,
) -> KernelLibrary:
    """The library, asked for every kernel that the model needs."""
    if device.type != "cuda":
        raise _UnsupportedError(f"the device is {device}")
    if block_tokens % 16:
        raise _UnsupportedError(f"pages hold {block_tokens} tokens, not a multiple of 16")
    if max_blocks > MAX_BLOCKS:
        raise _UnsupportedError(
            f"contexts have up to {max_blocks} pages, more than {MAX_BLOCKS}; "
            "a lower max_model_len would do"
        )
    with torch.cuda.device(device):
        library = KernelLibrary(find_library(Path(cache) if cache else default_cache()))
    library.decode_plan(device, dtype, model.head_dim)
    if model.sparse is not None and model.sparse.index_dim is not None:
        key_dtype = torch.int8 if index_dtype == "int8" else dtype
        library.select_plan(device, key_dtype, model.sparse.index_dim)
    return library
