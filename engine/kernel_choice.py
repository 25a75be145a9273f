"""Whether decode rows run on the CUDA kernels or on the PyTorch ops: decided once, at start."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from engine.config import KernelMode
from engine.errors import ConfigError
from engine.model.config import ModelConfig
from kernels._build import KernelBuildError, default_cache, find_library
from kernels._launch import MAX_BLOCKS, KernelError, KernelLibrary

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
) -> KernelLibrary | None:
    """The compiled kernels, or None for the PyTorch ops; says which, and why, in one line of log.

    Args:
        cache: folder of compiled kernels; None takes the default one.
        model: as it is served.
        block_tokens: tokens of a page.

    Raises:
        ConfigError: mode is "cuda" and the kernels cannot be had; the message says why.
    """
    try:
        if mode == "torch":
            raise _UnsupportedError("the setting kernels says so")
        library = _library(cache, model, device, dtype, block_tokens)
    except (_UnsupportedError, KernelBuildError, KernelError) as reason:
        if mode == "cuda":
            raise ConfigError(f"kernels cuda is not possible: {reason}") from None
        logger.info("decode attention runs on the PyTorch ops: %s", reason)
        return None
    logger.info("decode attention runs on the CUDA kernels")
    return library


def _library(
    cache: str | None,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
) -> KernelLibrary:
    """The library, asked for every kernel that the model needs."""
    if device.type != "cuda":
        raise _UnsupportedError(f"the device is {device}")
    if block_tokens % 16:
        raise _UnsupportedError(f"pages hold {block_tokens} tokens, not a multiple of 16")
    if (blocks := -(-model.max_position_embeddings // block_tokens)) > MAX_BLOCKS:
        raise _UnsupportedError(f"contexts have up to {blocks} pages, more than {MAX_BLOCKS}")
    with torch.cuda.device(device):
        library = KernelLibrary(find_library(Path(cache) if cache else default_cache()))
    library.decode_plan(device, dtype, model.head_dim)
    if model.sparse is not None and model.sparse.index_dim is not None:
        library.select_ctas(device, dtype, model.sparse.index_dim)
    return library
