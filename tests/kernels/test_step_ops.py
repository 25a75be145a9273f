"""The ends of a decode step: the kernels, on the CPU (`emulation`), against the PyTorch ops."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import cuda_step, step_ops
from kernels._launch import KernelLibrary
from tests.kernels.emulation.library import compiler
from tests.kernels.step_case import inputs_of, step_results

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")


@pytest.fixture(scope="module")
def library(emulated_kernels: KernelLibrary) -> KernelLibrary:
    return emulated_kernels


@pytest.mark.parametrize("width", [1, 9, 300])
def test_rows_are_placed(library: KernelLibrary, width: int) -> None:
    inputs_8R, newest_S, full_SB, window_SB = inputs_of(5, width, 16)
    tables = [full_SB.clone(), window_SB.clone()]
    want = step_ops.place_rows(inputs_8R[:, :5], newest_S, full_SB, window_SB, 16)
    got = cuda_step.place_rows(library, inputs_8R[:, :5], newest_S, tables[0], tables[1], 16)
    assert torch.equal(got.token_ids_R, want.token_ids_R)
    for mine, its in zip(got[1:3], want[1:3], strict=True):
        assert torch.equal(mine[0], its[0])
        assert torch.equal(mine[1], its[1])
    torch.testing.assert_close(got.top_p_R, want.top_p_R, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(tables[0], full_SB)
    assert torch.equal(tables[1], window_SB)


def test_inputs_mean_what_they_say() -> None:
    """Two rows and one that pads, by hand."""
    bits = torch.tensor([0.25, math.nan, math.nan], dtype=torch.float64).view(torch.int64)
    rows = [[50, -1, 0], [35, 16, 0], [36, 17, 0], [2, 0, 3], [5, 7, 0], [8, 1, 0], [1, 0, 0]]
    inputs = torch.tensor([*rows, bits.tolist()])
    full, window = (torch.zeros(4, 3, dtype=torch.int64) for _ in range(2))
    newest = torch.tensor([51, 52, 53, 54])
    placed = step_ops.place_rows(inputs, newest, full, window, 16)
    assert placed.token_ids_R.tolist() == [50, 51, 0]
    assert placed.token_slots_R[0].tolist() == [5 * 16 + 3, 7 * 16, 0]
    assert placed.token_slots_R[1].tolist() == [8 * 16 + 3, 16, 0]
    assert full.tolist() == [[0, 7, 0], [0, 0, 0], [0, 0, 5], [0, 0, 0]]
    assert placed.tables_RB[0].tolist() == [[0, 0, 5], [0, 7, 0], [0, 0, 0]]
    assert placed.top_p_R[0] == 0.25
    assert placed.top_p_R[1:].isnan().all()


@pytest.mark.parametrize("vocabulary", [1, 61, 4096])
@pytest.mark.parametrize("heads", [None, 3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_tokens_are_picked(
    library: KernelLibrary, dtype: torch.dtype, heads: int | None, vocabulary: int
) -> None:
    given = step_results(4, vocabulary, 40, heads, dtype)
    found = given[-1].clone()
    got = cuda_step.pick_tokens(library, *given[:-1], found)
    want = step_ops.pick_tokens(*given)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert torch.equal(found, given[-1])


def test_newest_tokens_are_kept_by_row_of_the_tables() -> None:
    """But for rows that pad a batch."""
    logits, hidden, _, inputs, newest = step_results(3, 50, 8, None, torch.float32)
    logits[0, 7] = logits[1, 8] = logits[2, 9] = 100.0
    inputs[step_ops.TABLE_ROW] = torch.tensor([4, 2, 0])
    step_ops.pick_tokens(logits, hidden, None, inputs, newest)
    assert newest.tolist() == [9, 50, 8, 50, 50], "the first one pads"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", [0, 1], ids=["logits", "hidden"])
def test_what_is_not_finite_is_seen(library: KernelLibrary, where: int, bad: float) -> None:
    given = step_results(3, 500, 24, None, torch.bfloat16)
    (given[0], given[1])[where][1, -1] = bad
    for found in (step_ops.pick_tokens(*given), cuda_step.pick_tokens(library, *given)):
        assert found[3:].tolist() == [1.0, 0.0, 1.0]
        assert ((found[:3] >= 0) & (found[:3] < 500)).all()


def test_the_lowest_of_equal_tokens_is_picked(library: KernelLibrary) -> None:
    given = step_results(2, 3000, 8, None, torch.float32)
    given[0][0, [2999, 1700, 40]] = 100.0
    given[0][1] = -7.0
    assert cuda_step.pick_tokens(library, *given)[:2].tolist() == [40.0, 0.0]


def test_the_door_names_what_is_wrong(library: KernelLibrary) -> None:
    inputs_8R, newest_S, full_SB, window_SB = inputs_of(2, 3, 16)
    with pytest.raises(ValueError, match="8=8, got 7"):
        cuda_step.place_rows(library, inputs_8R[1:], newest_S, full_SB, window_SB, 16)
    with pytest.raises(ValueError, match=r"full must be torch\.int64"):
        cuda_step.place_rows(library, inputs_8R, newest_S, full_SB.int(), window_SB, 16)
    with pytest.raises(ValueError, match=r"newest must be torch\.int64"):
        cuda_step.place_rows(library, inputs_8R, newest_S.int(), full_SB, window_SB, 16)
    logits, _, counts, inputs, newest = step_results(2, 8, 8, 1, torch.float32)
    with pytest.raises(ValueError, match=r"hidden must be torch\.float32"):
        cuda_step.pick_tokens(library, logits, logits.bfloat16(), counts, inputs, newest)
    with pytest.raises(ValueError, match=r"in whole rows"):
        cuda_step.pick_tokens(library, logits, logits, counts, inputs.T.contiguous().T, newest)
