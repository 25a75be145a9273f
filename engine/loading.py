"""From settings to a scheduler and a runner that are ready: check, load, plan memory, allocate."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Literal

import torch

from engine.config import EngineConfig
from engine.device import resolve_device, resolve_dtype
from engine.kernel_choice import choose_kernels, choose_layer_kernels, choose_prefill
from engine.kv_pools import KvPools
from engine.memory_budget import check_weights_fit, max_blocks, plan_for
from engine.memory_plan import MemoryPlan
from engine.messages import EngineInfo
from engine.model.checkpoint import Checkpoint, preflight
from engine.model.config import ModelConfig
from engine.model.decode_kernels import DecodeKernels
from engine.model.head_layout import model_heads
from engine.model.kv_bytes import block_tokens_of
from engine.model.kv_cache import KVCache
from engine.model.weights import load_decoder
from engine.read_bytes import read_bytes
from engine.scheduler import Scheduler
from engine.step import EngineParts
from engine.worker import ModelRunner
from kernels._launch import KernelLibrary

logger = logging.getLogger(__name__)


def load_engine_parts(config: EngineConfig) -> EngineParts:
    """Everything the loop needs.

    Raises:
        CheckpointError: the folder is unusable; one line that names the file.
        ConfigError: a setting is impossible here, with the numbers.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    stored = preflight(Path(config.model))
    block_tokens = block_tokens_of(stored.config)
    checkpoint = _as_served(stored, config)
    check_weights_fit(checkpoint, device, dtype)
    library = choose_kernels(
        config.kernels,
        config.kernel_cache,
        checkpoint.config,
        device,
        dtype,
        block_tokens,
        max_blocks(config, checkpoint.config, block_tokens),
        config.index_dtype,
    )
    decoder = load_decoder(checkpoint, device, dtype)
    model = checkpoint.config
    kernels = None
    if library is not None:
        kernels = _decode_kernels(config, model, library, device, dtype, block_tokens)
        decoder.kernels = choose_layer_kernels(
            config.kernels, library, model, device, dtype, block_tokens, config.index_dtype
        )
    prefill = choose_prefill(
        config.kernels, library, model, device, dtype, block_tokens, config.prefill_attention
    )
    plan = plan_for(config, decoder, device, dtype, block_tokens, kernels, prefill)
    cache = KVCache(
        model,
        full_pages=plan.full_pages,
        window_pages=plan.window_pages,
        block_tokens=block_tokens,
        device=device,
        dtype=dtype,
        index_dtype=config.index_dtype,
    )
    kernel_mode: Literal["cuda", "torch"] = "torch" if kernels is None else "cuda"
    info = _describe(config, model, plan, device, dtype, kernel_mode)
    runner = ModelRunner(
        decoder,
        cache,
        info,
        device,
        config.prefill_attention,
        kernels,
        prefill,
        cuda_graphs=config.cuda_graphs,
    )
    return EngineParts(_scheduler(config, model, plan, device), runner)


def _as_served(checkpoint: Checkpoint, config: EngineConfig) -> Checkpoint:
    """The checkpoint, without its sparse section if it is to be served densely."""
    if checkpoint.config.sparse is None:
        if config.attention == "sparse":
            logger.info("%s has no sparse section: it is served densely", checkpoint.folder)
        return checkpoint
    if config.attention == "sparse":
        return checkpoint
    dense = dataclasses.replace(checkpoint.config, sparse=None)
    return dataclasses.replace(checkpoint, config=dense, indexer={})


def _decode_kernels(
    config: EngineConfig,
    model: ModelConfig,
    library: KernelLibrary,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
) -> DecodeKernels:
    """Made before the rest of the memory is divided, so that it is counted as it is."""
    return DecodeKernels(
        library,
        model,
        device,
        dtype,
        max_rows=config.max_num_seqs,
        max_blocks=max_blocks(config, model, block_tokens),
    )


def _scheduler(
    config: EngineConfig, model: ModelConfig, plan: MemoryPlan, device: torch.device
) -> Scheduler:
    pools = KvPools(
        full_pages=plan.full_pages,
        window_pages=plan.window_pages,
        block_tokens=plan.block_tokens,
        window_tokens=0 if model.sparse is None else model.sparse.window_tokens,
        sink_tokens=0 if model.sparse is None else model.sparse.sink_tokens,
        prefix_caching=config.prefix_caching,
        cache_generated=config.cache_generated,
    )
    return Scheduler(
        pools,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_step_seconds=step_seconds(config, device),
    )


def step_seconds(config: EngineConfig, device: torch.device) -> float | None:
    """Aim of a step beside which others wait; None: no aim. See `server.config`."""
    if config.max_step_ms == "auto":
        return 0.1 if device.type == "cuda" else 0.4
    return None if config.max_step_ms is None else config.max_step_ms / 1000


def _describe(
    config: EngineConfig,
    model: ModelConfig,
    plan: MemoryPlan,
    device: torch.device,
    dtype: torch.dtype,
    kernels: Literal["cuda", "torch"],
) -> EngineInfo:
    return EngineInfo(
        vocab_size=model.vocab_size,
        max_model_len=plan.max_model_len,
        eos_token_ids=model.eos_token_ids,
        attention="dense" if model.sparse is None else "sparse",
        retrieval_heads=sum(len(heads.retrieval) for heads in model_heads(model)),
        attention_heads=model.num_layers * model.num_heads,
        kv_bytes_per_token=plan.bytes_per_token,
        kv_bytes_per_token_dense=plan.bytes_per_token_dense,
        block_tokens=plan.block_tokens,
        full_pages=plan.full_pages,
        window_pages=plan.window_pages,
        full_page_bytes=plan.full_page_bytes,
        window_page_bytes=plan.window_page_bytes,
        window_tokens=0 if model.sparse is None else model.sparse.window_tokens,
        reads=read_bytes(model, dtype.itemsize, config.index_dtype),
        max_num_seqs=config.max_num_seqs,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        kernels=kernels,
        plan=plan.render(),
    )
