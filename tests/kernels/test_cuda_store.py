"""From a layer's projection to where attention reads, on the CPU (`emulation`): the fused store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels._launch import KernelLibrary
from kernels.layer_inputs import HeadNorm, IndexProjections
from tests.kernels.emulation.library import compiler
from tests.kernels.store_case import HEAD_MAPS, StoreCase, check_int8_store, check_store

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@pytest.fixture(scope="module")
def library(emulated_kernels: KernelLibrary) -> KernelLibrary:
    return emulated_kernels


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
