"""On a GPU host: all kernels give the known answers there that the engine asks for at start. Skips
itself without CUDA.

    python -m pytest tests/gpu/test_trials.py
"""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from engine.kernel_choice import choose_kernels, choose_layer_kernels, choose_prefill
from engine.model.config import MoeConfig
from engine.model.kv_bytes import IndexDtype
from tests.engine.head_map_model import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("index_dtype", ["auto", "int8"])
@pytest.mark.parametrize("heads", [2, 8, 16, 40], ids="heads-{}".format)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_good_device_passes(
    dtype: torch.dtype, dim: int, heads: int, index_dtype: IndexDtype
) -> None:
    """GQA of 1 to 20; a mixture of experts of production size; memory is given back."""
    model = make_model([[0]], heads=heads, dim=dim, window=8192, sinks=4, index_dim=16, block=64)
    moe = MoeConfig(
        num_experts=128,
        experts_per_token=8,
        intermediate_size=768,
        normalize_weights=True,
        dense_layers=(),
    )
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "vocab_size": 151936}
    model = dataclasses.replace(model, moe=moe, **sizes)  # type: ignore[arg-type]  # ints
    library = choose_kernels("cuda", None, model, DEVICE, dtype, 64, 2048, index_dtype)
    assert library is not None
    held = torch.cuda.memory_allocated(DEVICE)  # workspace of cuBLAS, which the engine needs too
    start = time.monotonic()
    assert choose_kernels("cuda", None, model, DEVICE, dtype, 64, 2048, index_dtype) is not None
    layers = choose_layer_kernels("cuda", library, model, DEVICE, dtype, 64, index_dtype)
    print(f"tried out in {time.monotonic() - start:.2f} s")
    assert layers is not None
    del layers
    assert torch.cuda.memory_allocated(DEVICE) == held


@pytest.mark.parametrize("index_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_an_index_with_a_bias_by_age(dtype: torch.dtype, index_dtype: IndexDtype) -> None:
    sizes: dict[str, int] = {"heads": 8, "dim": 128, "window": 8192, "index_dim": 16, "block": 64}
    model = make_model([[0]], age_bias=True, **sizes)  # type: ignore[arg-type]  # ints
    assert choose_kernels("cuda", None, model, DEVICE, dtype, 64, 2048, index_dtype) is not None
    assert choose_prefill("cuda", None, model, DEVICE, dtype, 64, "sparse") is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_dense_model(dtype: torch.dtype) -> None:
    model = make_model(None, heads=8, dim=128)
    library = choose_kernels("cuda", None, model, DEVICE, dtype, 64, 2048)
    assert library is not None
    assert choose_layer_kernels("cuda", library, model, DEVICE, dtype, 64) is not None
