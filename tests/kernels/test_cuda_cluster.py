"""The selection of a single row by clusters of CTAs, without a GPU, against that by shares.

Both must give the same bits: words, lists, counts. The shares are held to the PyTorch ops in
`test_cuda_decode`, and layers of one row are here again, from end to end.
"""

from __future__ import annotations

import pytest
import torch

from kernels._args import SHORT_BLOCKS, SelectPlan
from kernels._launch import KernelLibrary
from kernels.head_tiles import HeadRole
from tests.kernels.cluster_case import by_clusters, check_choice, plan_of
from tests.kernels.emulation.library import compiler
from tests.kernels.layer_case import HEAD_MAPS, LayerCase
from tests.kernels.layer_check import check_layer

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")

# Of blocks of 16 tokens: at the edges of a block, of words, of what 8 and 16 CTAs have of them, and
# of the 32 blocks of a warp whose pages are looked up at once.
CONTEXTS = [1, 16, 17, 33, 511, 512, 513, 4096, 4097, 8192, 8200, 66000]
SIZES = pytest.mark.parametrize("size", [8, 16])


@pytest.fixture(scope="module")
def library(emulated_kernels: KernelLibrary) -> KernelLibrary:
    return emulated_kernels


@SIZES
@pytest.mark.parametrize("context", CONTEXTS)
def test_every_length(
    library: KernelLibrary, size: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LayerCase.make([context], "one-head", block=16, index_dim=8, top_p=0.6)
    check_choice(case, library, monkeypatch, size)


@pytest.mark.parametrize("index_dim", [8, 16, 32])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("keys", ["f32", "bf16", "int8"])
def test_every_kind_of_key(
    library: KernelLibrary, keys: str, block: int, index_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float32 if keys == "f32" else torch.bfloat16
    shape = {"dtype": dtype, "block": block, "index_dim": index_dim, "int8_index": keys == "int8"}
    case = LayerCase.make([11 * 128 + 5], "one-head", **shape)  # type: ignore[arg-type]
    check_choice(case, library, monkeypatch, 8)


@pytest.mark.parametrize("split", [False, True], ids=["mixed-tiles", "split-tiles"])
@pytest.mark.parametrize("head_map", ["mixed", "twenty-on-one", "three-of-four", "six-of-seven"])
def test_groups_in_which_several_heads_select(
    library: KernelLibrary, head_map: str, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, selecting, count in (("three-of-four", 3, 4), ("six-of-seven", 6, 7)):
        monkeypatch.setitem(HEAD_MAPS, name, on_one_kv_head(selecting, count))
    case = LayerCase.make([700], head_map, block=16, split_roles=split)
    check_choice(case, library, monkeypatch, 8)


def on_one_kv_head(selecting: int, count: int) -> list[HeadRole]:
    """The first `selecting` of `count` query heads select."""
    return [
        HeadRole("full", 0, retrieval=i < selecting, selected=i if i < selecting else None)
        for i in range(count)
    ]


@SIZES
def test_shares_of_everything_and_of_nothing(
    library: KernelLibrary, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LayerCase.make([16 * 100 - 3], "one-head", block=16)
    everything = check_choice(
        case.with_selection(top_p_S=torch.ones(1)), library, monkeypatch, size
    )
    assert everything["counts"][0] == 100
    assert everything["attended"][0, 0] == 16 * 100 - 3
    nothing = case.with_selection(own_top_p_R=torch.zeros(1))
    found = check_choice(nothing, library, monkeypatch, size)
    first_bin = int(found["counts"][0])
    assert 3 <= first_bin < 10, "those that are always kept, and the largest"


@SIZES
def test_masses_that_are_no_numbers(
    library: KernelLibrary, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LayerCase.make([16 * 70], "one-head", block=16)
    assert case.selection is not None
    keys = case.selection.index_cache
    keys[case.full.tables_RB[0, 40]] = torch.nan
    check_choice(case, library, monkeypatch, size)
    keys.fill_(torch.nan)
    found = check_choice(case, library, monkeypatch, size)
    assert found["counts"][0] >= 3


def test_biases_by_age(library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    case = LayerCase.make([16 * 300 + 1], "all-retrieval", block=16)
    plain = check_choice(case, library, monkeypatch, 16)
    generator = torch.Generator().manual_seed(0)
    bias_SA = torch.randn(4, 16, generator=generator) * 2
    case = case.with_selection(age_bias_SA=bias_SA)
    found = check_choice(case, library, monkeypatch, 16)
    assert not torch.equal(found["words"], plain["words"])


@SIZES
def test_a_row_that_is_dense_selects_nothing(
    library: KernelLibrary, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for context in (0, 99):
        case = LayerCase.make([context], "mixed", dense_below=100)
        found = check_choice(case, library, monkeypatch, size)
        assert not found["attended"].any()
        assert (found["counts"] == -7).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_threads_does_not_matter(
    library: KernelLibrary, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LayerCase.make([16 * 150], "mixed", block=16)
    want = by_clusters(case, library, monkeypatch, 8)
    # The emulation takes the stream's handle as the seed of its order.
    monkeypatch.setattr("kernels._launch.stream_of", lambda _: 1000 + seed)
    for name, values in by_clusters(case, library, monkeypatch, 8).items():
        assert torch.equal(values, want[name]), name


@pytest.mark.parametrize("head_map", ["mixed", "all-retrieval", "one-head", "twenty-on-one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_layer_of_one_row(library: KernelLibrary, dtype: torch.dtype, head_map: str) -> None:
    case = LayerCase.make([1500], head_map, dtype=dtype, split_roles=True)
    heads = len(case.tiles.tile_of_selected_S)
    plan = plan_of(case, library)
    assert plan.cluster(heads, SHORT_BLOCKS + 1) == (16 if heads <= 2 else 8)
    check_layer(case, library)


def test_clusters_that_do_not_all_fit_are_not_used() -> None:
    plan = SelectPlan(clusters_of_8=16, clusters_of_16=7)
    sizes = [plan.cluster(heads, SHORT_BLOCKS + 1) for heads in (1, 7, 8, 16, 17)]
    assert sizes == [16, 16, 8, 8, 0]
    assert [plan.cluster(heads, SHORT_BLOCKS) for heads in (1, 16, 17)] == [8, 8, 0]
    assert SelectPlan(clusters_of_16=7).cluster(1, SHORT_BLOCKS) == 16
