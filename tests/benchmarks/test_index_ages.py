"""The bias for the age of keys: found where it was planted, and nothing where there is none."""

from __future__ import annotations

import pytest
import torch

from benchmarks.index_ages import EDGES, Rows, fit, means, quality
from conversion.document_attention import hide_future
from conversion.index_loss import token_kl

TOKENS, BLOCK = 1024, 64
BIAS_A = torch.tensor([4.0, 3.0, 2.0, 2.0, 1.0, 0.5, 0.0, 0.0, 0.0])


def planted(bias_A: torch.Tensor, temperature: float) -> Rows:
    """Attention that is the scores at a temperature with a bias for ages."""
    generator = torch.Generator().manual_seed(0)
    rows_R = torch.arange(TOKENS // 2, TOKENS, 16)
    scores_RT = torch.randn(len(rows_R), TOKENS, generator=generator)
    plain = Rows(rows_R, scores_RT, hide_future(scores_RT, rows_R))
    aged_RT = plain.aged(bias_A, torch.tensor(temperature))
    return Rows(rows_R, aged_RT.log_softmax(-1), plain.scores_RT)


def test_keys_to_come_stay_hidden_and_ages_count_from_the_query() -> None:
    rows = planted(torch.zeros(len(EDGES) + 1), 1.0)
    shift_RT = rows.aged(torch.arange(9.0), torch.tensor(1.0)) - rows.scores_RT
    row = int(rows.rows_R[0])
    assert not rows.aged(BIAS_A, torch.tensor(2.0))[0, row + 1 :].isfinite().any()
    for age, edges in ((0, 0), (7, 0), (8, 1), (31, 1), (511, 5), (512, 6)):
        assert shift_RT[0, row - age] == pytest.approx(edges, abs=1e-5)


def test_a_planted_bias_and_temperature_are_found() -> None:
    rows = planted(BIAS_A, 0.5)
    bias_A, temperature = fit([rows])
    before = token_kl(rows.log_attention_RT, rows.scores_RT).mean()
    after = token_kl(rows.log_attention_RT, rows.aged(bias_A, temperature)).mean()
    assert before > 0.3
    assert after < before / 20
    assert float(temperature) == pytest.approx(0.5, abs=0.1)


def test_what_the_ages_explain_takes_fewer_blocks() -> None:
    rows = planted(BIAS_A * 2, 1.0)
    aged_RT = rows.aged(*fit([rows]))
    index = quality([rows], [rows.scores_RT], 0.9, BLOCK)
    with_ages = quality([rows], [aged_RT], 0.9, BLOCK)
    assert with_ages["blocks"] < index["blocks"] / 2
    assert with_ages["blocks"] == pytest.approx(index["teacher_blocks"], abs=1)
    record = {kind: {"index": index, "with_ages": with_ages} for kind in ("anywhere", "answers")}
    assert means([record, record])["answers"]["with_ages"] == with_ages
