"""Biases of ages that the fit's documents do not reach: set by longer ones, the others kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from conversion.age_bias import balanced, with_age_bias
from conversion.convert_options import ConvertOptions
from conversion.errors import ConversionError
from conversion.fit_options import FitOptions
from conversion.parallel import Ranks
from conversion.pipeline import convert
from engine.model.checkpoint import preflight
from engine.model.weights import load_decoder
from tests.conversion.aged_scores import BLOCK, PLANTED, ROWS, TOKENS, by_range, hidden
from tests.engine.model.tiny_models import make_checkpoint

QUIET = Console(quiet=True)
FIT = FitOptions(
    steps=2, queries=16, moment_documents=1, trial_documents=1, quality_documents=1, age_documents=2
)


def test_old_ages_are_set_anew_and_the_others_keep_their_biases() -> None:
    nothing_RT = hidden(torch.zeros(len(ROWS), TOKENS))
    attention_RT = with_age_bias(nothing_RT, PLANTED, ROWS, BLOCK).log_softmax(-1)
    before_A = PLANTED.clone()
    before_A[4:] = 3.0  # as if nothing older than range 3 had been seen
    index_RT = with_age_bias(nothing_RT, before_A, ROWS, BLOCK)
    given = (by_range(index_RT)[None], by_range(attention_RT)[None], Ranks(), before_A[None])
    torch.testing.assert_close(balanced(*given, first=4)[0], PLANTED, atol=1e-3, rtol=0)
    kept_A = balanced(*given, first=16)[0]
    torch.testing.assert_close(kept_A, before_A - before_A[6])


@pytest.fixture
def options(options: ConvertOptions) -> ConvertOptions:
    """Documents with ages up to 15 blocks, range 4."""
    return replace(options, documents=1, document_tokens=250, fit=FIT)


def biases(folder: Path) -> Tensor:
    indexers = load_decoder(preflight(folder), "cpu", torch.float32).indexers
    return torch.cat([own.age_bias_HA for own in indexers if own and own.age_bias_HA is not None])


def test_a_conversion_sets_them_by_longer_documents(
    tmp_path: Path, options: ConvertOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conversion.report.report_folder.has_matplotlib", lambda: False)
    make_checkpoint("qwen3", tmp_path / "dense")
    for name, tokens in (("near", 0), ("same", 250), ("far", 500)):
        given = replace(options, fit=replace(FIT, age_tokens=tokens))
        convert(tmp_path / "dense", tmp_path / name, given, QUIET)
    near_HA, same_HA, far_HA = (biases(tmp_path / name) for name in ("near", "same", "far"))
    assert torch.equal(near_HA, same_HA)
    assert (near_HA[:, 4:] == 0).all()
    assert (far_HA[:, 4] != 0).all()
    assert (far_HA[:, 5:] == 0).all()  # 500 tokens are up to 31 blocks, range 5
    torch.testing.assert_close(far_HA[:, :4].diff(dim=1), near_HA[:, :4].diff(dim=1))


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ConversionError, match="age_tokens must be at least 0"):
        FitOptions(age_tokens=-1)


def test_ages_need_a_bias(options: ConvertOptions) -> None:
    with pytest.raises(ConversionError, match="age_tokens needs index_age_bias"):
        replace(options, index_age_bias=False, fit=replace(FIT, age_tokens=500))
