"""From settings to a scheduler and a runner that are ready: check, load, plan memory, allocate."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Literal

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.host_memory import free_host_bytes, resident_bytes
from engine.kernel_choice import choose_kernels, choose_layer_kernels, choose_prefill
from engine.kv_pools import KvPools
from engine.memory_plan import MemoryPlan, default_cache_bytes, plan_memory, recorded_step_bytes
from engine.messages import EngineInfo
from engine.model.checkpoint import Checkpoint, preflight
from engine.model.config import ModelConfig
from engine.model.decode_kernels import DecodeKernels
from engine.model.decoder import Decoder
from engine.model.head_layout import model_heads
from engine.model.kv_bytes import block_tokens_of
from engine.model.kv_cache import KVCache
from engine.model.weights import load_decoder
from engine.read_bytes import read_bytes
from engine.scheduler import Scheduler
from engine.step import EngineParts
from engine.worker import ModelRunner
from kernels._launch import KernelLibrary
from kernels.device_prefill import DevicePrefill

logger = logging.getLogger(__name__)

FIRST_STEP_BYTES = 2**25  # what torch's CPU libraries take for themselves in the first steps


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
    _check_fit(checkpoint, device, dtype)
    library = choose_kernels(
        config.kernels,
        config.kernel_cache,
        checkpoint.config,
        device,
        dtype,
        block_tokens,
        _max_blocks(config, checkpoint.config, block_tokens),
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
    plan = _plan(config, decoder, device, dtype, block_tokens, kernels, prefill)
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


def resolve_device(name: str) -> torch.device:
    """The device that a setting means; raises ConfigError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise ConfigError(f"device {name} is not there; CUDA devices found: {count}")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; `auto` follows the device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


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


def _check_fit(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse before loading what cannot be loaded."""
    free = _free_bytes(device)
    needed = checkpoint.weight_count * dtype.itemsize
    if needed > free:
        raise ConfigError(f"the weights take {needed:,} bytes, {device} has {free:,} free")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return free_host_bytes()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def _max_blocks(config: EngineConfig, model: ModelConfig, block_tokens: int) -> int:
    """Blocks of the longest context that can be asked for; the plan may find room for less."""
    most = model.max_position_embeddings
    longest = min(config.max_model_len or most, most)
    return -(-longest // block_tokens)


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
        max_blocks=_max_blocks(config, model, block_tokens),
    )


def _plan(
    config: EngineConfig,
    decoder: Decoder,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
    kernels: DecodeKernels | None,
    prefill: DevicePrefill | None,
) -> MemoryPlan:
    model, weights = decoder.config, decoder.num_bytes
    recorded = 0
    if kernels is not None and config.cuda_graphs:
        blocks = _max_blocks(config, model, block_tokens)
        recorded = recorded_step_bytes(model, dtype.itemsize, config.max_num_seqs, blocks)
    cache_bytes = config.kv_cache_bytes
    if cache_bytes is None:
        cache_bytes = default_cache_bytes(
            model,
            free_bytes=max(_free_bytes(device) - recorded, 0),
            on_cuda=device.type == "cuda",
            smallest_tokens=config.max_model_len or model.max_position_embeddings,
            item_bytes=dtype.itemsize,
        )
    return plan_memory(
        model,
        item_bytes=dtype.itemsize,
        weight_bytes=weights,
        cache_bytes=cache_bytes,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        block_tokens=block_tokens,
        process_bytes=_process_bytes(weights) if device.type == "cpu" else 0,
        decode_bytes=0 if kernels is None else kernels.num_bytes + recorded,
        prefill_bytes=None if prefill is None else _prefill_bytes(config, model, prefill),
        index_dtype=config.index_dtype,
    )


def _prefill_bytes(config: EngineConfig, model: ModelConfig, prefill: DevicePrefill) -> int:
    """Workspace of the prefill kernels: they take some only where retrieval heads select."""
    if config.prefill_attention == "dense":
        return 0
    selecting = max(len(heads.index_row) for heads in model_heads(model))
    blocks = _max_blocks(config, model, block_tokens_of(model))
    return prefill.workspace_bytes(config.max_batch_tokens, config.max_num_seqs, selecting, blocks)


def _process_bytes(weights: int) -> int:
    """What interpreter and libraries take, after loading `weights` bytes of weights."""
    return max(resident_bytes() - weights, 0) + FIRST_STEP_BYTES


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
