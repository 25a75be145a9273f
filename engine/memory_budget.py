"""What there is for `engine.memory_plan` to divide: settings and a device in, a plan out.

The order matters: weights and the workspace of kernels are there before the plan is made, so that
they are counted as they are, and the cache gets a share of what they leave.
"""

from __future__ import annotations

import torch

from engine.config import EngineConfig
from engine.device import free_bytes
from engine.errors import ConfigError
from engine.host_memory import resident_bytes
from engine.memory_plan import MemoryPlan, default_cache_bytes, plan_memory, recorded_step_bytes
from engine.model.checkpoint import Checkpoint
from engine.model.config import ModelConfig
from engine.model.decode_kernels import DecodeKernels
from engine.model.decoder import Decoder
from engine.model.head_layout import model_heads
from engine.model.kv_bytes import block_tokens_of
from kernels.device_prefill import DevicePrefill

FIRST_STEP_BYTES = 2**25  # what torch's CPU libraries take for themselves in the first steps


def check_weights_fit(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse before loading what cannot be loaded.

    Raises:
        ConfigError: the device has not the memory, with both numbers.
    """
    free = free_bytes(device)
    needed = checkpoint.weight_count * dtype.itemsize
    if needed > free:
        raise ConfigError(f"the weights take {needed:,} bytes, {device} has {free:,} free")


def max_blocks(config: EngineConfig, model: ModelConfig, block_tokens: int) -> int:
    """Blocks of the longest context that can be asked for; the plan may find room for less."""
    most = model.max_position_embeddings
    longest = min(config.max_model_len or most, most)
    return -(-longest // block_tokens)


def plan_for(
    config: EngineConfig,
    decoder: Decoder,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
    kernels: DecodeKernels | None,
    prefill: DevicePrefill | None,
) -> MemoryPlan:
    """The plan for a model that is loaded, with the kernels that it runs on.

    Args:
        decoder: its weights are on `device`.
        dtype: of keys and values.
        block_tokens: of a page.
        kernels: of decode rows, with their workspace; None: the PyTorch ops.
        prefill: of prompt tokens; None: the PyTorch ops.

    Raises:
        ConfigError: one request of the maximum length does not fit; the message names the bytes.
    """
    model, weights = decoder.config, decoder.num_bytes
    recorded = 0
    if kernels is not None and config.cuda_graphs:
        blocks = max_blocks(config, model, block_tokens)
        recorded = recorded_step_bytes(model, dtype.itemsize, config.max_num_seqs, blocks)
    cache_bytes = config.kv_cache_bytes
    if cache_bytes is None:
        cache_bytes = default_cache_bytes(
            model,
            free_bytes=max(free_bytes(device) - recorded, 0),
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
    blocks = max_blocks(config, model, block_tokens_of(model))
    return prefill.workspace_bytes(config.max_batch_tokens, config.max_num_seqs, selecting, blocks)


def _process_bytes(weights: int) -> int:
    """What interpreter and libraries take, after loading `weights` bytes of weights."""
    return max(resident_bytes() - weights, 0) + FIRST_STEP_BYTES
