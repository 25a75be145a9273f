"""What a setting makes of the machine, and how the want of memory is told from other errors."""

from __future__ import annotations

import pytest
import torch

from engine.device import is_out_of_memory, resolve_device, resolve_dtype
from engine.errors import ConfigError


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99", "cpu:1", ""])
def test_devices_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("float32", "cuda", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_the_dtype_follows_the_setting_or_the_device(
    name: str, device: str, dtype: torch.dtype
) -> None:
    assert resolve_dtype(name, torch.device(device)) == dtype


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("shapes do not match"), False),
    ],
)
def test_the_want_of_memory_is_told_from_faults(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory


def test_torchs_cpu_allocator_still_says_it_in_these_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
