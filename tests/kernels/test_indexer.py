"""Scoring and selection: the fast ops against the specification, and what selection promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import indexer, reference
from kernels.block_age import AGE_RANGES, age_bias
from tests.kernels.paged_case import PagedCase, random_tensor


def test_project_index() -> None:
    x_TND, weight_HID = random_tensor(5, 3, 16), random_tensor(4, 6, 16)
    args = (x_TND, weight_HID, torch.tensor([2, 0, 0, 1]))
    torch.testing.assert_close(indexer.project_index(*args), reference.project_index(*args))


@pytest.mark.parametrize("limit", [1, 2**24], ids=["row-by-row", "at-once"])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 2, 0, 1], [1]], ids=str)
@pytest.mark.parametrize("lens", [[1], [7, 8, 9, 17], [1, 64, 33, 100]], ids=str)
def test_score_blocks(
    lens: list[int], rows: list[int], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer, "MAX_GATHERED", limit)
    case = PagedCase.make(lens)
    qi_RHI = random_tensor(len(lens), len(rows), 4)
    args = (qi_RHI, torch.tensor(rows), case.index_cache, case.tables_SB, case.lens_S)
    torch.testing.assert_close(indexer.score_blocks(*args), reference.score_blocks(*args))


@pytest.mark.parametrize("lens", [[1], [7, 8, 9, 17], [1, 64, 33, 100], [900, 257]], ids=str)
def test_score_blocks_with_a_bias_by_age(lens: list[int]) -> None:
    """As specified; what is added is the bias alone, and nothing lies past the context."""
    case, rows = PagedCase.make(lens), torch.tensor([2, 0, 0])
    qi_RHI, bias_HA = random_tensor(len(lens), 3, 4), 3 * random_tensor(3, AGE_RANGES)
    args = (qi_RHI, rows, case.index_cache, case.tables_SB, case.lens_S, None)
    got = indexer.score_blocks(*args, bias_HA)
    torch.testing.assert_close(got, reference.score_blocks(*args, bias_HA))
    plain = indexer.score_blocks(*args)
    assert torch.equal(got, plain + age_bias(bias_HA, case.lens_S, plain.shape[2], 8))
    assert torch.equal(got.isfinite(), plain.isfinite())
    assert torch.equal(indexer.score_blocks(*args, torch.zeros_like(bias_HA)), plain)


@pytest.mark.parametrize("limit", [1, 2**24], ids=["row-by-row", "at-once"])
@pytest.mark.parametrize("lens", [[1], [7, 8, 9, 17], [1, 64, 33, 100]], ids=str)
def test_score_blocks_by_int8_keys(
    lens: list[int], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As specified, and off by no more than half a step and the queries allow."""
    monkeypatch.setattr(indexer, "MAX_GATHERED", limit)
    case, rows = PagedCase.make(lens), torch.tensor([2, 2, 0, 1])
    qi_RHI = random_tensor(len(lens), 4, 4)
    steps, scales = case.int8_index()
    tail = (case.tables_SB, case.lens_S)
    got = indexer.score_blocks(qi_RHI, rows, steps, *tail, scales)
    torch.testing.assert_close(got, reference.score_blocks(qi_RHI, rows, steps, *tail, scales))
    exact = reference.score_blocks(qi_RHI, rows, case.index_cache, *tail)
    inside = exact.isfinite()
    off = 0.75 * float(scales.nan_to_num().max()) * float(qi_RHI.abs().sum(-1).max())
    assert 0 < float((got - exact)[inside].abs().max()) <= off
    assert torch.equal(got.isfinite(), inside)


def test_every_head_has_a_bias_of_its_own() -> None:
    case = PagedCase.make([20])
    args = (random_tensor(1, 3, 4), torch.tensor([0, 1, 2]), case.index_cache, case.tables_SB)
    with pytest.raises(ValueError, match="age_bias"):
        indexer.score_blocks(*args, case.lens_S, age_bias_HA=torch.zeros(2, AGE_RANGES))


def test_score_blocks_takes_what_project_index_returns() -> None:
    """Regression: projected queries are not contiguous, and scoring several rows of them failed."""
    case = PagedCase.make([20, 9])
    queries = random_tensor(2, 4, 16), random_tensor(3, 4, 16), torch.tensor([3, 0, 1])
    tail = (torch.tensor([0, 1, 2]), case.index_cache, case.tables_SB, case.lens_S)
    torch.testing.assert_close(
        indexer.score_blocks(indexer.project_index(*queries), *tail),
        reference.score_blocks(reference.project_index(*queries), *tail),
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", [slice(3, 4), slice(None)], ids=["one-block", "all-blocks"])
def test_values_that_are_not_finite_have_no_mass(bad: float, where: slice) -> None:
    """Regression: a NaN became the index of a bin, and one bad sequence ended the whole step."""
    log_mass = random_tensor(2, 3, 9)
    lens, top_p = torch.tensor([72, 72]), torch.full((2, 3), 0.4)
    healthy = indexer.select_blocks(log_mass, top_p, lens, 8)[1]
    log_mass[0, :, where] = bad
    got = indexer.select_blocks(log_mass, top_p, lens, 8)
    assert torch.equal(got, reference.select_blocks(log_mass, top_p, lens, 8))
    assert torch.equal(got[1], healthy)
    assert got[0][:, [0, 7, 8]].all()
    assert not got[0][:, where][:, 0].any() or where.start is None


@st.composite
def masses(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log masses of 3 rows and 2 heads with ties, far outliers and ragged ends."""
    block = 8
    lens = draw(st.lists(st.integers(1, 80), min_size=3, max_size=3))
    value = st.one_of(
        st.floats(-40, 40, width=32), st.sampled_from([0.0, 1.0, 1.125]), st.just(-3e4)
    )
    log_mass = torch.full((3, 2, 11), -torch.inf)
    for row, length in enumerate(lens):
        for head in range(2):
            for index in range(-(-length // block)):
                log_mass[row, head, index] = draw(value)
    top_p = torch.tensor(draw(st.lists(st.floats(0.01, 1.0), min_size=6, max_size=6))).view(3, 2)
    return log_mass, top_p, torch.tensor(lens)


@settings(deadline=None, max_examples=150)
@given(masses())
def test_selection_equals_the_specification_bit_for_bit(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    log_mass, top_p, lens = case
    got = indexer.select_blocks(log_mass, top_p, lens, 8)
    assert torch.equal(got, reference.select_blocks(log_mass, top_p, lens, 8))


def test_what_lies_past_the_context_has_no_mass() -> None:
    """It was counted: a larger mass past a row's end moved its threshold and its bins."""
    log_mass = torch.zeros(1, 1, 9)
    log_mass[..., 1] = 2.0
    log_mass[..., 5:] = 50.0
    lens, top_p = torch.tensor([37]), torch.tensor([[0.6]])
    mask = indexer.select_blocks(log_mass, top_p, lens, 8)
    assert torch.equal(mask, reference.select_blocks(log_mass, top_p, lens, 8))
    assert mask[0, 0].tolist() == [True, True, False, True, True, False, False, False, False]


@settings(deadline=None, max_examples=150)
@given(masses())
def test_selection_keeps_its_promises(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    log_mass, top_p, lens = case
    mask = indexer.select_blocks(log_mass, top_p, lens, 8)
    weights = log_mass.double().softmax(-1)
    assert ((weights * mask).sum(-1) >= top_p.double() - 1e-6).all()
    for row, length in enumerate(lens.tolist()):
        blocks = -(-length // 8)
        assert mask[row, :, [0, blocks - 1, max(blocks - 2, 0)]].all()
        assert not mask[row, :, blocks:].any()
        assert mask[row][top_p[row] >= 1][:, :blocks].all()
        # What is dropped is never heavier than what is kept for its mass, ties included.
        free = slice(1, max(blocks - 2, 1))
        for head in range(2):
            kept, dropped = mask[row, head, free], ~mask[row, head, free]
            if kept.any() and dropped.any():
                masses_B = log_mass[row, head, free]
                assert masses_B[kept].min() > masses_B[dropped].max()


def test_selection_does_not_depend_on_the_order_of_blocks() -> None:
    log_mass = 4 * random_tensor(1, 1, 64)
    lens, top_p = torch.tensor([512]), torch.tensor([[0.7]])
    order = torch.cat((torch.tensor([0]), 1 + torch.randperm(61), torch.tensor([62, 63])))
    straight = indexer.select_blocks(log_mass, top_p, lens, 8)
    assert straight.sum() < 60
    assert torch.equal(
        indexer.select_blocks(log_mass[..., order], top_p, lens, 8), straight[..., order]
    )


def test_count_attended() -> None:
    mask = torch.rand(4, 3, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    lens = torch.tensor([1, 8, 60, 72])
    got = indexer.count_attended(mask, lens, 8)
    assert torch.equal(got, reference.count_attended(mask, lens, 8))


def test_a_model_with_one_dominant_block_reads_little() -> None:
    log_mass = torch.zeros(1, 1, 100)
    log_mass[0, 0, 40] = 10.0
    mask = indexer.select_blocks(log_mass, torch.tensor([[0.9]]), torch.tensor([800]), 8)
    assert mask[0, 0].nonzero().flatten().tolist() == [0, 40, 98, 99]
