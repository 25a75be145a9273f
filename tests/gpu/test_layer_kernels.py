"""On a GPU host: the kernels around attention against their specification. Skips itself without
CUDA.

    python -m pytest tests/gpu/test_layer_kernels.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import cuda_experts, cuda_layer, cuda_step, layer_reference, step_ops
from kernels._launch import KernelLibrary
from tests.kernels.step_case import inputs_of, step_results
from tests.kernels.store_case import HEAD_MAPS, StoreCase, check_int8_store, check_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@pytest.mark.parametrize("head_map", HEAD_MAPS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 300])
@pytest.mark.parametrize("dim", [64, 128])
@DTYPES
def test_store(
    library: KernelLibrary, dtype: torch.dtype, dim: int, tokens: int, head_map: str
) -> None:
    case = StoreCase.make(tokens, head_map, dtype=dtype, dim=dim, block=64, device="cuda")
    check_store(case, library)


@pytest.mark.parametrize(
    "options",
    [
        {"index_dim": 8},
        {"index_dim": 32},
        {"normed": False},
        {"query_tokens": 3},
        {"query_tokens": 0},
        {"stored_index": False},
        {"dim": 128, "block": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [5, 2100])
@DTYPES
def test_store_options(
    library: KernelLibrary, dtype: torch.dtype, tokens: int, options: dict[str, Any]
) -> None:
    check_store(StoreCase.make(tokens, dtype=dtype, device="cuda", **options), library)


@pytest.mark.parametrize("options", [{}, {"index_dim": 8, "dim": 128}, {"index_dim": 32}], ids=str)
@pytest.mark.parametrize("tokens", [5, 2100])
@DTYPES
def test_store_of_int8_index_keys(
    library: KernelLibrary, dtype: torch.dtype, tokens: int, options: dict[str, Any]
) -> None:
    case = StoreCase.make(tokens, dtype=dtype, stored_index=False, device="cuda", **options)
    case.projected_TRD[3] = torch.nan
    case.projected_TRD[4] = 0
    check_int8_store(case, library)


@DTYPES
def test_repeats_and_graphs_are_identical(library: KernelLibrary, dtype: torch.dtype) -> None:
    def case() -> StoreCase:
        return StoreCase.make(33, dtype=dtype, dim=128, device="cuda")

    first = {name: value.clone() for name, value in case().run(library).items()}
    recorded = case()
    recorded.run(library)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = recorded.run(library)
    for _ in range(10):
        graph.replay()
        again = case().run(library)
        for name, value in first.items():
            assert torch.equal(written[name].nan_to_num(), value.nan_to_num()), name
            assert torch.equal(again[name].nan_to_num(), value.nan_to_num()), name


@pytest.mark.parametrize("size", [8, 256, 1000, 2048, 4096, 12288])
@pytest.mark.parametrize("tokens", [1, 7, 8192])
@DTYPES
def test_rows(library: KernelLibrary, dtype: torch.dtype, tokens: int, size: int) -> None:
    """Sums of rows, their norm, and gates: as close to float32 as the PyTorch op is, twice."""
    generator = torch.Generator("cuda").manual_seed(size)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    x, branch, weight = random(tokens, size), random(tokens, size), 1 + random(size) / 4
    gate_up = 3 * random(tokens, 2 * size)
    summed, normed = cuda_layer.add_norm(library, x, branch, weight, 1e-6)
    assert torch.equal(summed, x + branch)
    alone = cuda_layer.add_norm(library, summed, None, weight, 1e-6)
    assert alone[0] is summed
    assert torch.equal(alone[1], normed)
    twin = layer_reference.add_norm(summed, None, weight, 1e-6)[1]
    exact = layer_reference.add_norm(summed.float(), None, weight.float(), 1e-6)[1]
    as_close(normed, twin, exact)
    gated = cuda_layer.silu_mul(library, gate_up)
    as_close(gated, layer_reference.silu_mul(gate_up), layer_reference.silu_mul(gate_up.float()))


@pytest.mark.parametrize("tokens", [1, 8, 33, 256])
@DTYPES
def test_experts(library: KernelLibrary, dtype: torch.dtype, tokens: int) -> None:
    """128 experts of which each token takes 8, as in Qwen3-30B-A3B, narrower."""
    generator = torch.Generator("cuda").manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    logits, x = random(tokens, 128), random(tokens, 256)
    gate_up, down = random(128, 2 * 96, 256) / 16, random(128, 256, 96) / 10
    weights, ids = cuda_experts.route_experts(library, logits, 8, True)
    want_weights, want_ids = layer_reference.route_experts(logits, 8, True)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights, rtol=2**-7, atol=0.0)

    def compare(got: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, gated: bool) -> None:
        twin = layer_reference.gate_experts if gated else layer_reference.project_experts
        as_close(got, twin(rows, ids, weight), twin(rows.float(), ids, weight.float()))

    inner = cuda_experts.gate_experts(library, x, ids, gate_up)
    compare(inner, x, gate_up, True)
    found = cuda_experts.project_experts(library, inner, ids, down)
    compare(found, inner, down, False)
    for _ in range(5):
        assert torch.equal(cuda_experts.gate_experts(library, x, ids, gate_up), inner)


@pytest.mark.parametrize("vocabulary", [61, 4096, 151936])
@pytest.mark.parametrize("heads", [None, 3, 300])
@DTYPES
def test_ends_of_a_step(
    library: KernelLibrary, dtype: torch.dtype, heads: int | None, vocabulary: int
) -> None:
    given = step_results(9, vocabulary, 512, heads, dtype)
    on_gpu = [None if value is None else value.cuda() for value in given]
    got = cuda_step.pick_tokens(library, *on_gpu)  # type: ignore[arg-type]  # as given
    torch.testing.assert_close(got.cpu(), step_ops.pick_tokens(*given), rtol=1e-12, atol=0)
    assert on_gpu[-1] is not None
    assert torch.equal(on_gpu[-1].cpu(), given[-1])
    inputs_8R, newest_S, *tables = inputs_of(9, 500, 64)
    tables_on_gpu = [table.cuda() for table in tables]
    want = step_ops.place_rows(inputs_8R[:, :9], newest_S, tables[0], tables[1], 64)
    there = (inputs_8R.cuda()[:, :9], newest_S.cuda(), tables_on_gpu[0], tables_on_gpu[1])
    placed = cuda_step.place_rows(library, *there, 64)
    assert torch.equal(placed.token_ids_R.cpu(), want.token_ids_R)
    for mine, its in zip((*placed[1:3], tables_on_gpu), (*want[1:3], tables), strict=True):
        assert torch.equal(mine[0].cpu(), its[0])
        assert torch.equal(mine[1].cpu(), its[1])


def as_close(got: torch.Tensor, twin: torch.Tensor, exact: torch.Tensor) -> None:
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
        return
    allowed = 2 * float((twin.float() - exact).abs().max()) + 1e-6
    assert float((got.float() - exact).abs().max()) <= allowed
