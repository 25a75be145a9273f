"""A report says what it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from conversion.evaluation.report import EvalReport
from conversion.evaluation.ruler.tasks import RULER_TASKS
from conversion.report.contents import Contents
from conversion.report.gaps import unmeasured
from conversion.report.sources import Sources
from tests.conversion.report.report_data import evaluation


@pytest.fixture(scope="module")
def bare(conversion: Path) -> Contents:
    return Contents.gather(Sources(conversion / "out", print), [], None)


def gaps(bare: Contents, *reports: EvalReport) -> str:
    return "\n".join(unmeasured(replace(bare, evaluations=reports)))


def test_without_evaluations_nothing_is_known_of_quality(bare: Contents) -> None:
    assert "no evaluation was run" in gaps(bare)
    assert "no ablations" in gaps(bare)
    assert "no evaluation was run" not in gaps(bare, evaluation())


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (("code_list",), "RULER: none"),
        (RULER_TASKS[:-2], f"RULER in full: 2 tasks not run ({', '.join(RULER_TASKS[-2:])})"),
        (RULER_TASKS, ""),
    ],
    ids=["none", "part", "all"],
)
def test_tasks_of_ruler_that_were_not_run(bare: Contents, tasks: Sequence[str], words: str) -> None:
    told = gaps(bare, evaluation(tasks=tasks))
    assert words in told
    assert ("RULER" in told) == bool(words)


def test_lengths_that_say_nothing_and_lengths_beyond(bare: Contents) -> None:
    window, longest = bare.model.window_tokens, bare.model.max_position_embeddings
    assert f"longer than the window of {window}" in gaps(bare, evaluation(lengths=(window,)))
    beyond = gaps(bare, evaluation(lengths=(2 * window,)))
    assert "longer than the window" not in beyond
    assert f"beyond {2 * window} tokens; the model takes {longest:,}" in beyond
    assert "beyond" not in gaps(bare, evaluation(lengths=(longest,)))


def test_text_and_answers_are_told_apart(bare: Contents) -> None:
    assert "the task text was not run" in gaps(bare, evaluation(text=False))
    assert "no task with answers" in gaps(bare, evaluation(tasks=()))
    assert "the task text" not in gaps(bare, evaluation())


def test_differences_too_small_to_be_seen(bare: Contents) -> None:
    report = evaluation()
    widths = [
        (gap.high - gap.low) / 2 for own in report.averages for gap in own.differences.values()
    ]
    assert f"below about {100 * max(widths):.1f} points" in gaps(bare, report)


def test_the_source_of_a_distilled_model(bare: Contents) -> None:
    assert bare.distil is not None
    assert "The source model itself" in gaps(bare, evaluation())
    both = evaluation(variants=("teacher", "dense", "sparse"))
    assert "The source model itself" not in gaps(bare, both)
    plain = replace(bare, distil=None)
    assert "nothing was distilled" in gaps(plain, evaluation())
    assert "The source model itself" not in gaps(plain, evaluation())


def test_no_reference(bare: Contents) -> None:
    assert "A dense reference" in gaps(bare, evaluation(variants=("sparse",)))
    assert "A dense reference" not in gaps(bare, evaluation())
