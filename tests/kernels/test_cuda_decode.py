"""Decode attention of a layer by the CUDA kernels, without a GPU, against the PyTorch ops.

Their sources run on the CPU (`emulation`). What that cannot show (speed, interleaving of CTAs, the
compiler's code) `tests/gpu` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from kernels._args import DecodePlan
from kernels._launch import KernelError, KernelLibrary
from kernels.decode_inputs import PagedPool, Selection
from kernels.paged_kv import store_kv
from tests.kernels.emulation.library import compiler
from tests.kernels.large_pool import moved, moved_pool, pages_past_int32
from tests.kernels.layer_case import HEAD_MAPS, LayerCase, with_int8_keys
from tests.kernels.layer_check import check_layer
from tests.kernels.paged_case import random_tensor

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")

EDGES = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 400]


@pytest.fixture(scope="module")
def library(emulated_kernels: KernelLibrary) -> KernelLibrary:
    return emulated_kernels


@pytest.mark.parametrize("split", [False, True], ids=["mixed-tiles", "split-tiles"])
@pytest.mark.parametrize("head_map", HEAD_MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_layer(library: KernelLibrary, dtype: torch.dtype, head_map: str, split: bool) -> None:
    check_layer(LayerCase.make(EDGES, head_map, dtype=dtype, split_roles=split), library)


@pytest.mark.parametrize("head_map", ["mixed", "all-retrieval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_layer_with_int8_index_keys(
    library: KernelLibrary, dtype: torch.dtype, head_map: str
) -> None:
    case = LayerCase.make(EDGES, head_map, dtype=dtype, split_roles=True, int8_index=True)
    check_layer(case, library)


@pytest.mark.parametrize("int8_index", [False, True], ids=["bf16", "int8"])
def test_a_layer_with_a_bias_by_age(library: KernelLibrary, int8_index: bool) -> None:
    """It selects other blocks than the same index without."""
    case = LayerCase.make(
        [*EDGES, 1700],
        dtype=torch.bfloat16,
        split_roles=True,
        int8_index=int8_index,
        age_bias=True,
    )
    check_layer(case, library)
    _, biased_RS = case.run(case.workspace(library))
    plain = case.with_selection(age_bias_SA=None)
    _, plain_RS = plain.run(plain.workspace(library))
    assert biased_RS is not None
    assert plain_RS is not None
    assert (biased_RS[-1] != plain_RS[-1]).all()


@pytest.mark.parametrize("shared_bytes", [0, 1064], ids=["none", "256-blocks"])
def test_log_masses_that_shared_memory_does_not_hold(
    library: KernelLibrary, shared_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LayerCase.make([16, 8000], "one-head", block=16, index_dim=8)
    want = case.run(case.workspace(library))
    plan = library.select_plan(torch.device("cpu"), torch.float32, 8)
    monkeypatch.setattr(plan, "shared_bytes", shared_bytes)
    got = case.run(case.workspace(library))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_sizes(library: KernelLibrary, dtype: torch.dtype, dim: int, block: int) -> None:
    case = LayerCase.make([1, 129, 260], dtype=dtype, dim=dim, block=block, top_p=0.3)
    check_layer(case, library)


@pytest.mark.parametrize(
    ("window", "sinks"), [(1, 0), (1, 4), (64, 0), (65, 64), (100, 1), (1000, 4), (70, 100)]
)
def test_windows(library: KernelLibrary, window: int, sinks: int) -> None:
    # The specification has at most a block of sinks; the twin of more is not to be trusted.
    sinks = min(sinks, 64)
    check_layer(LayerCase.make(EDGES, window=window, sinks=sinks), library)


def test_without_an_index_retrieval_heads_see_everything(library: KernelLibrary) -> None:
    check_layer(LayerCase.make(EDGES, indexed=False), library)


def test_rows_below_the_threshold_are_dense_and_not_counted(library: KernelLibrary) -> None:
    check_layer(LayerCase.make([100, 255, 256, 257, 500], dense_below=256), library)


def test_a_rows_own_share_wins(library: KernelLibrary) -> None:
    case = LayerCase.make([700, 700, 700], top_p=0.9)
    own = torch.tensor([torch.nan, 0.05, 1.0])
    _, common_RS = case.run(case.workspace(library))
    case = case.with_selection(own_top_p_R=own)
    check_layer(case, library)
    _, attended_RS = case.run(case.workspace(library))
    assert attended_RS is not None
    assert common_RS is not None
    assert torch.equal(attended_RS[0], common_RS[0])
    assert (attended_RS[1] < common_RS[1]).all()
    assert (attended_RS[2] == 700).all()


def test_rows_that_pad_a_batch_give_zeros(library: KernelLibrary) -> None:
    check_layer(LayerCase.make([0, 200, 0, 5]), library)
    check_layer(LayerCase.make([0, 0]), library)


def test_more_rows_than_one_launch_takes(
    library: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.cuda_decode.MAX_ITEMS", 7)  # three tiles: two rows a launch
    check_layer(LayerCase.make([70, 5, 200, 64, 33]), library)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_pools_of_more_elements_than_int32_counts(
    library: KernelLibrary, dtype: torch.dtype
) -> None:
    """A GPU's default cache is that large; every page lies past 2^31 elements here."""
    case = LayerCase.make([70, 300], dtype=dtype, index_dim=32)
    want_RHD, want_attended = case.run(case.workspace(library))
    assert case.selection is not None
    index_cache = case.selection.index_cache
    by = max(map(pages_past_int32, (case.full.k_cache, case.window.k_cache, index_cache)))
    try:
        full, window = moved_pool(case.full, by), moved_pool(case.window, by)
        far = replace(case, full=full, window=window)
        far = far.with_selection(index_cache=moved(index_cache, by))
    except OSError:
        pytest.skip("this host reserves all memory that is asked for")
    got_RHD, attended = far.run(far.workspace(library))
    assert torch.equal(got_RHD, want_RHD)
    assert attended is not None
    assert want_attended is not None
    assert torch.equal(attended, want_attended)
    slots_T = far.full.tables_RB[0, :1] * 64 + torch.tensor([9])
    k_TND, v_TND = (random_tensor(1, 2, 64, seed=seed).to(dtype) for seed in (1, 2))
    store_kv(k_TND, v_TND, full.k_cache, full.v_cache, slots_T)
    page = int(far.full.tables_RB[0, 0])
    assert torch.equal(full.k_cache[page, :, 9], k_TND[0])
    assert torch.equal(full.v_cache[page, :, 9], v_TND[0])


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_threads_does_not_matter(
    library: KernelLibrary, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LayerCase.make([900, 64, 333], dtype=torch.bfloat16, dim=128)
    want, _ = case.run(case.workspace(library))
    # The emulation takes the stream's handle as the seed of its order.
    monkeypatch.setattr("kernels._launch.stream_of", lambda _: 1000 + seed)
    got, _ = case.run(case.workspace(library))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_few_items_on_many_ctas(
    library: KernelLibrary, dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row on a device of 120 CTAs: each piece has one of its own; merges are of 35 parts."""
    plan = library.decode_plan(torch.device("cpu"), dtype, dim, wide=True)
    large = DecodePlan(120, plan.warps, plan.shared_bytes, plan.overlap)
    monkeypatch.setattr(library, "decode_plan", lambda *_, wide: large)
    make = partial(LayerCase.make, dtype=dtype, dim=dim, block=16)
    check_layer(make([16 * 175], "twenty-on-one", window=10**6, indexed=False), library)
    check_layer(make([900], split_roles=True, window=500), library)


def test_a_missing_shape_is_named(library: KernelLibrary) -> None:
    case = LayerCase.make([20], dim=96)
    with pytest.raises(KernelError, match="head_dim 96"):
        case.workspace(library)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"q_RHD": c.q_RHD.double()}, "of one dtype"),
        (lambda c: {"q_RHD": c.q_RHD[:, :3]}, "H=12, got 3"),
        (lambda c: {"lens_R": c.lens_R.int()}, "context_lens must be int64"),
        (lambda c: {"full": _with_cache(c.full, c.full.k_cache[:, :, :8])}, "contiguous"),
        (lambda c: {"full": _with_cache(c.full, torch.zeros(9, 2, 8, 64))}, "multiple of 16"),
        (lambda c: {"selection": replace(c.selection, top_p_S=torch.ones(2))}, "S=3, got 2"),
        (lambda c: {"selection": replace(c.selection, qi_RSI=c.q_RHD[:, :3, :16])}, None),
        (lambda c: {"selection": _int8(c, index_scales=None)}, "of one dtype"),
        (lambda c: {"selection": _int8(c, index_scales=torch.ones(2, 3, 64))}, "P=7, got 2"),
        (lambda c: {"selection": _int8(c, index_cache=c.selection.index_cache)}, "must be bfloat"),
    ],
    ids=[
        *("dtype", "heads", "lens", "strides", "page", "top_p", "a-view-is-fine"),
        *("no-scales", "scales", "scales-of-floats"),
    ],
)
def test_the_door_names_what_is_wrong(
    library: KernelLibrary,
    change: Callable[[LayerCase], dict[str, Any]],
    message: str | None,
) -> None:
    case = LayerCase.make([70, 20])
    workspace = case.workspace(library)
    case = replace(case, **change(case))
    if message is None:
        case.run(workspace)
        return
    with pytest.raises(ValueError, match=message):
        case.run(workspace)


def test_a_workspace_that_is_too_small_is_refused(library: KernelLibrary) -> None:
    workspace = LayerCase.make([70]).workspace(library)
    with pytest.raises(ValueError, match="2 rows; the workspace was made for 1"):
        LayerCase.make([70, 70]).run(workspace)


def _int8(case: LayerCase, **changes: Any) -> Selection:
    assert case.selection is not None
    return replace(with_int8_keys(case.selection), **changes)


def _with_cache(pool: PagedPool, cache: torch.Tensor) -> PagedPool:
    return PagedPool(cache, cache, pool.tables_RB)
