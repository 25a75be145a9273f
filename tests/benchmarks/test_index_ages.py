"""The bias for the age of keys: found where it was planted, and what it is worth there."""

from __future__ import annotations

import pytest
import torch

from benchmarks.index_ages import EDGES, AgedIndex, Rows, means, quality, train

TOKENS, BLOCK, DIM = 1024, 64, 8
BIAS_A = torch.tensor([5.0, 5.0, 5.0, 4.0, 2.0, 1.0, 0.0, 0.0, 0.0])
SAME = torch.eye(DIM)


def planted(bias_A: torch.Tensor | None) -> Rows:
    """Attention that is the products of random vectors with a bias for ages."""
    generator = torch.Generator().manual_seed(0)
    rows_R = torch.arange(TOKENS // 2, TOKENS, 16)
    q_RD = torch.randn(len(rows_R), DIM, generator=generator)
    k_TD = torch.randn(TOKENS, DIM, generator=generator) / DIM**0.5
    plain = Rows(rows_R, torch.empty(0), q_RD, k_TD)
    attention_RT = AgedIndex(SAME, SAME, bias_A).scores(plain).log_softmax(-1)
    return Rows(rows_R, attention_RT, q_RD, k_TD)


def test_keys_to_come_are_hidden_and_ages_count_from_the_query() -> None:
    rows = planted(None)
    aged_RT = AgedIndex(SAME, SAME, torch.arange(float(len(EDGES) + 1))).scores(rows)
    shift_RT = aged_RT - AgedIndex(SAME, SAME).scores(rows)
    row = int(rows.rows_R[0])
    assert not aged_RT[0, row + 1 :].isfinite().any()
    for age, edges in ((0, 0), (7, 0), (8, 1), (31, 1), (511, 5), (512, 6)):
        assert shift_RT[0, row - age] == pytest.approx(edges, abs=1e-5)


def test_a_planted_bias_is_found_and_saves_blocks() -> None:
    rows, start = planted(BIAS_A), AgedIndex(SAME, SAME)
    aged, without = (train([rows], start, ages=ages) for ages in (True, False))
    assert start.loss(rows) > 1
    assert aged.loss(rows) < without.loss(rows) / 10
    assert aged.bias_A is not None
    assert float(aged.bias_A[0] - aged.bias_A[6]) == pytest.approx(5.0, abs=0.5)
    found = {
        name: quality([rows], index, 0.9, BLOCK)
        for name, index in (("trained", without), ("with_ages", aged))
    }
    assert found["with_ages"]["blocks"] == pytest.approx(
        found["with_ages"]["teacher_blocks"], abs=1
    )
    assert found["trained"]["blocks"] > 1.5 * found["with_ages"]["blocks"]
    record = {"anywhere": found, "answers": found}
    assert means([record, record])["answers"] == found
