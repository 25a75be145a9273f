"""What is drawn is what was measured: positions and heights are read back from the figures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from conversion.report.ablation_lines import ablation_lines
from conversion.report.ablation_plot import ablation_figure
from conversion.report.age_bias_plot import age_bias_figure
from conversion.report.attended import attended_points
from conversion.report.attended_plot import attended_figure
from conversion.report.contents import Contents
from conversion.report.evaluation_file import read_ablations
from conversion.report.head_map_plot import head_map_figure
from conversion.report.indexer_plot import blocks_figure, kept_mass_figure
from conversion.report.loss_gap_plot import loss_gap_figure, loss_gaps
from conversion.report.plots import draw_pictures
from conversion.report.score_plot import LEAST_SHOWN, score_figure
from conversion.report.sources import Sources
from conversion.report.training_plot import SMOOTH_STEPS, training_figure
from tests.conversion.report.report_data import ablations, evaluation, written


@pytest.fixture(scope="module")
def contents(conversion: Path) -> Contents:
    return Contents.gather(Sources(conversion / "out", print), [evaluation(grid=True)], None)


def heights(line: Any) -> list[float]:
    """Of the points of a line."""
    return [float(value) for value in line.get_ydata()]


def test_the_head_map_has_every_score_and_outlines_the_retrieval_heads(contents: Contents) -> None:
    heads = contents.heads
    assert heads is not None
    axes = head_map_figure(contents.model, heads).axes[0]
    assert axes.images[0].get_array().tolist() == heads.scores
    boxes = axes.collections[0].get_paths()
    centres = {tuple(round(v) for v in box.get_extents().get_points().mean(0)) for box in boxes}
    assert centres == {
        (head, layer)
        for layer, chosen in enumerate(contents.model.retrieval_heads)
        for head in chosen
    }


def test_the_head_map_needs_no_scores(contents: Contents) -> None:
    figure = head_map_figure(contents.model, None)
    assert len(figure.axes) == 1  # no scale of colours that mean nothing
    assert len(figure.axes[0].collections[0].get_paths()) == contents.model.kept


def test_scores_fall_with_the_rank_and_the_chosen_are_marked(contents: Contents) -> None:
    heads = contents.heads
    assert heads is not None
    points_of = {
        own.get_label(): own.get_offsets().tolist()
        for own in score_figure(contents.model, heads).axes[0].collections
        if own.get_label() in ("local", "retrieval")
    }
    assert len(points_of["retrieval"]) == contents.model.kept
    points = sorted(points_of["local"] + points_of["retrieval"])
    expected = sorted((score for layer in heads.scores for score in layer), reverse=True)
    assert [value for _, value in points] == [max(score, LEAST_SHOWN) for score in expected]


def test_kept_mass_shows_every_head_and_the_mean(contents: Contents) -> None:
    indexer = contents.indexer
    assert indexer is not None
    for axes, queries in zip(kept_mass_figure(indexer).axes, ("anywhere", "answers"), strict=True):
        *heads, mean, _ = axes.lines
        assert len(heads) == contents.model.kept
        for line, head in zip(heads, indexer.heads, strict=True):
            kept = [getattr(point, queries).kept_mass for point in head.curve]
            assert heights(line) == kept
        columns = zip(*(heights(line) for line in heads), strict=True)
        assert heights(mean) == pytest.approx([sum(c) / len(c) for c in columns])


def test_blocks_are_drawn_against_the_teachers(contents: Contents) -> None:
    indexer = contents.indexer
    assert indexer is not None
    blocks, kl = blocks_figure(indexer).axes
    assert blocks.collections[0].get_offsets().tolist() == [
        [head.anywhere.teacher_blocks, head.anywhere.blocks] for head in indexer.heads
    ]
    assert kl.collections[1].get_offsets().tolist() == [
        [head.closed_form.answers.kl, head.answers.kl] for head in indexer.heads
    ]


def test_biases_stand_over_ages_in_blocks(contents: Contents) -> None:
    indexer = contents.indexer
    assert indexer is not None
    (axes,) = age_bias_figure(indexer).axes
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert names == ["0", "1", "2-3", "4-7", "8-15", "16-31"]  # of 300 tokens in blocks of 16
    assert len(axes.lines) == contents.model.kept
    for line, head in zip(axes.lines, indexer.heads, strict=True):
        assert head.age_bias is not None
        assert heights(line) == list(head.age_bias[:6])
        assert set(head.age_bias[5:]) == {0.0}
        assert len(set(head.age_bias[:5])) == 5


def test_a_panel_for_each_curve_of_training(contents: Contents) -> None:
    indexer, distil = contents.indexer, contents.distil
    assert indexer is not None
    assert distil is not None
    fit, loss, agreement = training_figure(indexer, distil).axes
    assert heights(fit.lines[0]) == list(indexer.losses)
    assert heights(loss.lines[1]) == [gap.kl for gap in distil.validations]
    assert heights(agreement.lines[0]) == [gap.agreement for gap in distil.validations]
    assert len(training_figure(indexer, None).axes) == 1
    assert len(training_figure(None, distil).axes) == 2


def test_long_losses_have_a_running_mean(contents: Contents) -> None:
    indexer = contents.indexer
    assert indexer is not None
    losses = tuple(math.sin(step) for step in range(3 * SMOOTH_STEPS))
    (axes,) = training_figure(replace(indexer, losses=losses), None).axes
    raw, mean = axes.lines
    assert heights(raw) == list(losses)
    assert mean.get_xdata()[0] == SMOOTH_STEPS
    assert heights(mean)[-1] == pytest.approx(sum(losses[-SMOOTH_STEPS:]) / SMOOTH_STEPS)


def test_attended_tokens_stand_over_their_lengths() -> None:
    tokens, shares = attended_figure(attended_points(evaluation())).axes
    dense, sparse = tokens.lines
    assert heights(dense) == [256, 512]
    assert heights(sparse) == pytest.approx([64, 64])
    assert heights(shares.lines[0]) == pytest.approx([25, 12.5])


def test_the_gap_is_the_variants_loss_above_the_reference() -> None:
    report = evaluation()
    gaps = loss_gaps(report)
    assert [gap.gaps for gap in gaps] == [(0.0, 0.5), (0.0, 0.5)]
    panels = loss_gap_figure(gaps, "dense").axes
    assert [axes.get_title() for axes in panels] == ["256 tokens", "512 tokens"]
    other = replace(report.curves[1], edges=(0, 5, 255))
    assert loss_gaps(replace(report, curves=(report.curves[0], other))) == []


def test_bars_are_as_long_as_the_scores(tmp_path: Path) -> None:
    runs = {"sparse": evaluation(variants=("dense", "a")), "random heads": evaluation(text=False)}
    lines = ablation_lines(read_ablations(written(tmp_path / "a.json", ablations(runs))))
    first, second = ablation_figure(lines).axes
    assert [bar.get_width() for bar in first.patches] == pytest.approx([25, 25])
    assert [label.get_text() for label in first.get_yticklabels()] == ["sparse", "random heads"]
    assert second.get_title() == "512 tokens"


def test_a_persons_style_does_not_leak_in_or_out(contents: Contents) -> None:
    contents = replace(contents, evaluations=(), distil=None)
    before = draw_pictures(contents)
    with mpl.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert draw_pictures(contents) == before
        assert mpl.rcParams["font.size"] == 30
    assert all(png.startswith(b"\x89PNG") for png in before.values())
