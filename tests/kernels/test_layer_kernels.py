"""Rows of a layer and its experts on the CPU (`emulation`), against their specification."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels import cuda_experts, cuda_layer, layer_reference
from kernels._launch import KernelLibrary
from tests.kernels.emulation.library import compiler
from tests.kernels.paged_case import random_tensor

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@pytest.fixture(scope="module")
def library(emulated_kernels: KernelLibrary) -> KernelLibrary:
    return emulated_kernels


def same_but_for_order(got: torch.Tensor, want: torch.Tensor) -> None:
    """A sum in another order may round a number of bfloat16 to its neighbour."""
    if got.dtype == torch.bfloat16:
        torch.testing.assert_close(got, want, rtol=2**-7, atol=0.0)
    else:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [8, 64, 2504, 12288])
@pytest.mark.parametrize("added", [True, False], ids=["sum", "norm-alone"])
@DTYPES
def test_add_norm(library: KernelLibrary, dtype: torch.dtype, added: bool, size: int) -> None:
    x, branch, weight = (random_tensor(3, size, seed=i).to(dtype) for i in range(3))
    args = (x, branch if added else None, weight[0], 1e-6)
    got = cuda_layer.add_norm(library, *args)
    want = layer_reference.add_norm(*args)
    assert torch.equal(got[0], want[0])
    same_but_for_order(got[1], want[1])


@pytest.mark.parametrize(("tokens", "size"), [(1, 8), (3, 1000), (5, 2056)])
@DTYPES
def test_silu_mul(library: KernelLibrary, dtype: torch.dtype, tokens: int, size: int) -> None:
    gate_up = (6 * random_tensor(tokens, 2 * size)).to(dtype)
    gate_up[0, :2] = torch.tensor([200.0, -200.0])
    got, want = cuda_layer.silu_mul(library, gate_up), layer_reference.silu_mul(gate_up)
    same_but_for_order(got, want)


def test_rows_that_are_not_taken(library: KernelLibrary) -> None:
    assert not cuda_layer.takes_rows(torch.float32, 6)
    assert not cuda_layer.takes_rows(torch.bfloat16, 2**16)
    assert cuda_layer.takes_rows(torch.bfloat16, 8192)
    x = random_tensor(2, 6)
    with pytest.raises(ValueError, match=r"no kernel for rows of 6 in torch\.float32"):
        cuda_layer.add_norm(library, x, None, x[0], 1e-6)
    with pytest.raises(ValueError, match=r"no kernel for rows of 3 in torch\.float32"):
        cuda_layer.silu_mul(library, x)
    assert cuda_layer.silu_mul(library, x[:0].view(0, 8)[:, :8]).shape == (0, 4)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "chosen"), [(1, 1, 1), (5, 6, 2), (3, 128, 8), (2, 256, 32)]
)
@DTYPES
def test_route_experts(
    library: KernelLibrary,
    dtype: torch.dtype,
    tokens: int,
    experts: int,
    chosen: int,
    normalise: bool,
) -> None:
    logits = (2 * random_tensor(tokens, experts)).to(dtype)  # of bfloat16 some are equal
    weights, ids = cuda_experts.route_experts(library, logits, chosen, normalise)
    want_weights, want_ids = layer_reference.route_experts(logits, chosen, normalise)
    assert torch.equal(ids, want_ids)
    same_but_for_order(weights, want_weights)


def test_a_router_that_has_gone_wrong_chooses_experts_that_exist(library: KernelLibrary) -> None:
    """An expert that is not there would be read past the end of the weights."""
    logits = random_tensor(3, 40)
    logits[1] = torch.nan
    logits[2, 7] = torch.inf
    weights, ids = cuda_experts.route_experts(library, logits, 4, True)
    want_weights, want_ids = layer_reference.route_experts(logits[:1], 4, True)
    assert torch.equal(ids[:1], want_ids)
    torch.testing.assert_close(weights[:1], want_weights)
    assert weights[1:].isnan().all(), "so that the sequence is found out"
    assert int(ids.min()) >= 0
    assert int(ids.max()) < 40


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen"), [(1, 5, 2), (3, 5, 2), (9, 4, 3)], ids=str
)
@DTYPES
def test_expert_products(
    library: KernelLibrary, dtype: torch.dtype, tokens: int, experts: int, chosen: int
) -> None:
    """A column of CTAs for each pair, or for each expert; experts with none to seven pairs."""
    hidden, inner = 40, 24
    x = random_tensor(tokens, hidden).to(dtype)
    gate_up = (random_tensor(experts, 2 * inner, hidden, seed=1) * 0.2).to(dtype)
    down = (random_tensor(experts, hidden, inner, seed=2) * 0.2).to(dtype)
    logits = random_tensor(tokens, experts, seed=3)
    _, ids = layer_reference.route_experts(logits, chosen, True)
    gated = cuda_experts.gate_experts(library, x, ids, gate_up)
    close_to_exact(gated, layer_reference.gate_experts, x, ids, gate_up)
    found = cuda_experts.project_experts(library, gated, ids, down)
    close_to_exact(found, layer_reference.project_experts, gated, ids, down)
    alone = cuda_experts.gate_experts(library, x[-1:].clone(), ids[-1:].clone(), gate_up)
    assert torch.equal(alone, gated[-chosen:]), "others in the batch change nothing"


def close_to_exact(
    got: torch.Tensor, twin: Callable[..., torch.Tensor], *args: torch.Tensor
) -> None:
    """At most twice as far from float32 as the twin is."""
    exact = twin(*(arg.float() if arg.is_floating_point() else arg for arg in args))
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
    else:
        allowed = 2 * float((twin(*args).float() - exact).abs().max())
        assert float((got.float() - exact).abs().max()) <= allowed


def test_experts_that_are_not_taken(library: KernelLibrary) -> None:
    assert not cuda_experts.takes_experts(1, 257, 8)
    assert not cuda_experts.takes_experts(257, 128, 8)
    assert cuda_experts.takes_experts(256, 128, 8)
    with pytest.raises(ValueError, match="chooses 3 of 2 experts"):
        cuda_experts.route_experts(library, random_tensor(1, 2), 3, True)
    ids = torch.zeros(300, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match="no kernel for 300 tokens with 8 of 9 experts"):
        cuda_experts.gate_experts(library, random_tensor(300, 8), ids, random_tensor(9, 8, 8))
