"""The kernels around attention on the CPU (`emulation`), against their specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels import cuda_experts, cuda_layer, layer_reference
from kernels._launch import KernelLibrary
from kernels.layer_inputs import HeadNorm, IndexProjections
from tests.kernels.emulation.library import compiler
from tests.kernels.paged_case import random_tensor
from tests.kernels.store_case import HEAD_MAPS, StoreCase, check_int8_store, check_store

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


@pytest.mark.parametrize("head_map", HEAD_MAPS)
@DTYPES
def test_store(library: KernelLibrary, dtype: torch.dtype, head_map: str) -> None:
    check_store(StoreCase.make(7, head_map, dtype=dtype), library)


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (1, {"dim": 128}),
        (1, {"normed": False}),
        (5, {"index_dim": 8, "block": 64}),
        (5, {"index_dim": 32, "dim": 128, "normed": False}),
        (6, {"query_tokens": 2}),
        (6, {"query_tokens": 0}),
        (6, {"stored_index": False}),
        (0, {}),
    ],
    ids=str,
)
@DTYPES
def test_store_sizes_and_options(
    library: KernelLibrary, dtype: torch.dtype, tokens: int, options: dict[str, Any]
) -> None:
    check_store(StoreCase.make(tokens, dtype=dtype, **options), library)


@pytest.mark.parametrize("options", [{}, {"index_dim": 8, "dim": 128}, {"index_dim": 32}], ids=str)
@DTYPES
def test_store_of_int8_index_keys(
    library: KernelLibrary, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    case = StoreCase.make(7, dtype=dtype, stored_index=False, **options)
    assert case.index is not None
    case.projected_TRD[3] = torch.nan
    case.projected_TRD[5] = 0  # a key of zeros, whose scale is 0
    case.projected_TRD[6] *= 1e-20
    check_int8_store(case, library)


def test_more_tokens_than_teams(library: KernelLibrary) -> None:
    """A team goes on to the next token; 26 tasks leave 158 CTAs of 8 teams a task."""
    check_store(StoreCase.make(1300, "one-head", index_dim=8), library)


def test_a_token_is_stored_alike_beside_any_others(library: KernelLibrary) -> None:
    case = StoreCase.make(9, dtype=torch.bfloat16, stored_index=False)
    together = case.run(library)
    alone = StoreCase.make(9, dtype=torch.bfloat16, stored_index=False)

    def only(pool: Any) -> Any:
        return pool and replace(pool, slots_T=pool.slots_T[4:5].clone())

    assert alone.index is not None
    alone = replace(
        alone,
        projected_TRD=alone.projected_TRD[4:5].clone(),
        cos_TF=alone.cos_TF[4:5].clone(),
        sin_TF=alone.sin_TF[4:5].clone(),
        full=only(alone.full),
        window=only(alone.window),
        index=replace(alone.index, query_tokens=1),
    )
    got = alone.run(library)
    for name in ("q_THD", "qi_QSI", "ki_TXI"):
        assert torch.equal(got[name][0], together[name][4]), name
    assert case.full is not None
    page, place = divmod(int(case.full.slots_T[4]), 16)
    for name in ("full keys", "full values"):
        assert torch.equal(got[name][page, :, place], together[name][page, :, place])


def test_a_token_of_nan_spoils_no_other(library: KernelLibrary) -> None:
    case = StoreCase.make(4, stored_index=False)
    want = case.copied().specified()
    case.projected_TRD[1] = torch.nan
    got = case.run(library)
    others = [0, 2, 3]
    for name in ("q_THD", "qi_QSI", "ki_TXI"):
        torch.testing.assert_close(got[name][others], want[name][others], rtol=1e-5, atol=1e-5)
        assert got[name][1].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"heads": 11}, "R=19, got 20"),
        (lambda c: {"projected_TRD": c.projected_TRD[..., :32]}, "F=16, got 32"),
        (lambda c: {"projected_TRD": c.projected_TRD.double()}, "no kernel for torch.float64"),
        (lambda c: {"cos_TF": c.cos_TF.bfloat16()}, "cos must be torch.float32"),
        (lambda c: {"kv_row_N": c.kv_row_N.long()}, "kv_row must be torch.int32"),
        (lambda c: {"norm": HeadNorm(c.norm.weight_2D[:-1], 1e-6)}, "W=128, got 127"),
        (lambda c: {"full": replace(c.full, slots_T=c.full.slots_T[1:])}, "T=5, got 4"),
        (lambda c: {"full": replace(c.full, k_cache=c.full.k_cache[:, :, :8])}, "K=8, got 16"),
        (lambda c: {"full": None}, "need the full pool"),
        (lambda c: {"index": replace(c.index, query_tokens=6)}, "6 of 5 tokens"),
        (lambda c: {"index": _with_scales(c, torch.int8)}, "index_scales must be torch.bfloat16"),
        (lambda c: {"index": _with_scales(c, torch.bfloat16)}, "index_cache must be torch.int8"),
    ],
)
def test_the_door_names_what_is_wrong(
    library: KernelLibrary, change: Callable[[StoreCase], dict[str, Any]], message: str
) -> None:
    case = StoreCase.make(5)
    with pytest.raises(ValueError, match=message):
        replace(case, **change(case)).run(library)


def _with_scales(case: StoreCase, dtype: torch.dtype) -> IndexProjections:
    """Scales for a cache of floats, which needs none."""
    assert case.index is not None
    assert case.index.index_cache is not None
    scales = torch.zeros(case.index.index_cache.shape[:3], dtype=dtype)
    return replace(case.index, index_scales=scales)


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
