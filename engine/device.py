"""The device that a model runs on: which one a setting means, its memory, and the want of it."""

from __future__ import annotations

import torch

from engine.errors import ConfigError
from engine.host_memory import free_host_bytes


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


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take there; what torch keeps unused counts as taken."""
    if device.type == "cpu":
        return free_host_bytes()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def give_back_unused(device: torch.device) -> None:
    """Let the driver have what torch keeps of freed tensors, when all work there is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Torch has a class for the GPU's allocator alone; its CPU allocator and cuBLAS only words."""
    words = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(word in str(error) for word in words)
