"""Decode rows on the CUDA kernels, run on the CPU (`tests.kernels.emulation`): the same answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels._launch import KernelLibrary
from tests.engine.head_map_model import make_model
from tests.engine.paged_driver import RAGGED, Driver, ragged_outputs
from tests.engine.test_attention import LAYOUTS
from tests.kernels.emulation.library import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")

# What the kernels take; the layouts are those of the PyTorch ops' test.
SIZES: dict[str, Any] = {"dim": 64, "index_dim": 8, "block": 16, "window": 21}


@pytest.fixture(scope="module")
def library(emulated_kernels: KernelLibrary) -> KernelLibrary:
    return emulated_kernels


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_ragged_batches_equal_naive_masks(library: KernelLibrary, layout: dict[str, Any]) -> None:
    """Decode rows, replays of more rows than a launch takes, and prefill chunks in every step."""
    model = make_model(**SIZES | layout)
    driver = Driver(model, RAGGED, library=library)
    for index, got in enumerate(ragged_outputs(driver)):
        torch.testing.assert_close(got, driver.expected(index), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("layout", ["mixed-groups", "index-per-kv-head"])
def test_int8_index_keys_equal_naive_masks(library: KernelLibrary, layout: str) -> None:
    driver = Driver(
        make_model(**SIZES | LAYOUTS[layout]), RAGGED, library=library, index_dtype="int8"
    )
    for index, got in enumerate(ragged_outputs(driver)):
        torch.testing.assert_close(got, driver.expected(index), rtol=1e-4, atol=2e-6)


def test_the_token_budget_is_the_ops(library: KernelLibrary) -> None:
    model = make_model([[0, 3], []], **SIZES, dense_below=50)
    counts = []
    for given in (library, None):
        driver = Driver(model, [(40, 49), (50, 58)], top_p=[None, 0.05], library=given)
        driver.step([(0, 40, "prefill"), (1, 50, "prefill")])
        driver.step([(0, 9, "decode"), (1, 8, "decode")])
        assert driver.attended().keys() == {0}
        counts.append(driver.attended()[0])
    assert torch.equal(counts[0], counts[1])
    assert not counts[0][:9].any()
    assert counts[0][9:].all()


def test_a_selection_of_ones_own_takes_the_ops(library: KernelLibrary) -> None:
    """Evaluation compares rules of selection: the kernels know only the one that is served."""
    driver = Driver(make_model([[0, 3]], **SIZES), [(40, 44)], library=library)
    assert driver.layers.kernels is not None
    static = driver.layers
    own = type(static)(
        driver.model,
        driver.cache,
        driver.indexers,
        torch.device("cpu"),
        static.selections,
        kernels=static.kernels,
    )
    assert own.kernels is None


@pytest.mark.parametrize("layout", ["mixed-groups", "no-retrieval", "dense-model"])
def test_a_sequence_full_of_nan_spoils_no_other(library: KernelLibrary, layout: str) -> None:
    model = make_model(**SIZES | LAYOUTS[layout])
    driver = Driver(model, [(40, 44), (40, 44)], library=library)
    for name in ("q_pre", "k_pre", "q", "k", "v"):
        getattr(driver.sequences[0], name).fill_(torch.nan)
    driver.step([(0, 40, "prefill"), (1, 40, "prefill")])
    decode = driver.step([(0, 4, "decode"), (1, 4, "decode")])[1]
    want = driver.expected(1)[:, 40:]
    torch.testing.assert_close(decode, want, rtol=1e-4, atol=2e-6)
