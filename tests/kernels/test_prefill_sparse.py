"""Sparse prefill against the specification: tiles, shares, selection, attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import prefill, prefill_sparse, reference
from kernels.block_age import AGE_RANGES
from kernels.prefill_tiles import PrefillTiles
from tests.kernels.paged_case import PagedCase, random_tensor

SPANS = {
    "one-token": [(1, 1)],
    "whole": [(300, 300)],
    "chunk": [(470, 133)],
    "ragged": [(8, 8), (129, 129), (9, 1), (400, 37), (128, 128)],
}
HEADS = 3


class Case:
    """Spans with keys, index keys and queries of three heads over two KV heads."""

    def __init__(self, spans: list[tuple[int, int]]) -> None:
        self.pages = PagedCase.make([context for context, _ in spans], seed=len(spans))
        counts = torch.tensor([0] + [queries for _, queries in spans])
        self.starts = counts.cumsum(0)
        contexts = self.pages.lens_S.tolist()
        self.tiles = PrefillTiles.of_spans(self.starts.tolist(), contexts)
        self.q_THD = random_tensor(int(counts.sum()), HEADS, 16)
        self.qi_THI = 3 * random_tensor(int(counts.sum()), HEADS, 4, seed=3)
        self.rows = torch.tensor([1, 0, 1])
        self.index_rows = torch.tensor([2, 0, 1])

    @property
    def score_arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, PrefillTiles]:
        pages = self.pages
        return self.qi_THI, self.index_rows, pages.index_cache, pages.tables_SB, self.tiles

    @property
    def attend_arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        pages = self.pages
        return self.q_THD, self.rows, pages.k_cache, pages.v_cache, pages.tables_SB


@pytest.fixture(params=list(SPANS.values()), ids=list(SPANS))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_scores(case: Case) -> None:
    got = prefill_sparse.score_tiles(*case.score_arguments)
    want = reference.score_tiles(*case.score_arguments)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_scores_by_int8_keys(case: Case) -> None:
    steps, scales = case.pages.int8_index()
    args = (case.qi_THI, case.index_rows, steps, case.pages.tables_SB, case.tiles, scales)
    got, want = prefill_sparse.score_tiles(*args), reference.score_tiles(*args)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_scores_with_a_bias_by_age(case: Case) -> None:
    """Queries of a tile lie in different blocks: each counts ages from its own."""
    bias_HA = 3 * random_tensor(HEADS, AGE_RANGES, seed=4)
    got = prefill_sparse.score_tiles(*case.score_arguments, age_bias_HA=bias_HA)
    want = reference.score_tiles(*case.score_arguments, age_bias_HA=bias_HA)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    plain = prefill_sparse.score_tiles(*case.score_arguments)
    zero = prefill_sparse.score_tiles(*case.score_arguments, age_bias_HA=torch.zeros_like(bias_HA))
    assert torch.equal(zero, plain)
    if plain.shape[2] > 2:
        assert not torch.allclose(got, plain)


@pytest.mark.parametrize(("dense_tail", "dense_below"), [(0, 0), (1, 0), (150, 0), (0, 300)])
def test_selection_and_attention(case: Case, dense_tail: int, dense_below: int) -> None:
    shares = reference.score_tiles(*case.score_arguments)
    args = (
        torch.tensor([0.1, 0.5, 0.9]),
        case.tiles,
        case.pages.lens_S - dense_tail,
        dense_below,
        8,
    )
    mask = prefill_sparse.select_tiles(shares, *args)
    assert torch.equal(mask, reference.select_tiles(shares, *args))
    q, rows, k_cache, v_cache, tables = case.attend_arguments
    tail = (rows, k_cache, v_cache, tables, case.tiles, mask, 0.25)
    torch.testing.assert_close(
        prefill_sparse.prefill_sparse(q, *tail), reference.prefill_sparse(q, *tail)
    )


def test_everything_selected_is_dense_prefill(case: Case) -> None:
    q, rows, k_cache, v_cache, tables = case.attend_arguments
    shares = torch.zeros(case.tiles.count, HEADS, tables.shape[1])
    everything = (torch.ones(HEADS), case.tiles, case.pages.lens_S, 0, 8)
    mask = prefill_sparse.select_tiles(shares, *everything)
    got = prefill_sparse.prefill_sparse(q, rows, k_cache, v_cache, tables, case.tiles, mask, 0.25)
    lens = case.pages.lens_S
    want = prefill.prefill_dense(q, rows, k_cache, v_cache, tables, case.starts, lens, 0.25)
    torch.testing.assert_close(got, want)


def test_a_block_that_one_query_needs_is_read_by_its_tile() -> None:
    """Masses of the others, spread over many blocks, must not outweigh it."""
    case = Case([(600, 128)])
    case.qi_THI[:] = 0
    case.pages.index_cache[case.pages.tables_SB[0, 11], 2, 3] = torch.tensor([50.0, 0, 0, 0])
    case.qi_THI[15, 0, 0] = 1.0
    shares = prefill_sparse.score_tiles(*case.score_arguments)
    mask = prefill_sparse.select_tiles(
        shares, torch.full((HEADS,), 0.3), case.tiles, torch.tensor([600]), 0, 8
    )
    assert bool(mask[0, 0, 11])
