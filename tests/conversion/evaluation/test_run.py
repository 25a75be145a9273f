"""Whole evaluations of tiny random models, their tables and plots, and what is refused."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from conversion.errors import ConversionError
from conversion.evaluation.plots import plot_report
from conversion.evaluation.report import EvalReport, task_average
from conversion.evaluation.run import evaluate
from conversion.evaluation.tables import print_report, result_console
from tests.conversion.evaluation.small_evaluation import (
    POSITIONS,
    QUIET,
    TASKS_OF_EVERY_KIND,
    options,
)
from tests.engine.model.tiny_models import make_checkpoint

SECTION = {
    "retrieval_heads": [[0, 3], [], [5]],
    "window_tokens": 64,
    "sink_tokens": 4,
    "index_dim": 8,
    "index_scope": "query_head",
    "block_tokens": 16,
    "top_p": 0.5,
    "dense_below": 0,
}
EVERYTHING = {**SECTION, "window_tokens": 4096, "top_p": 1.0}


@pytest.fixture(scope="module")
def sparse_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sparse"
    make_checkpoint("qwen3", folder, section=SECTION, max_position_embeddings=POSITIONS)
    return folder


@pytest.fixture(scope="module")
def parts() -> list[EvalReport]:
    """What was kept on the way to `report`."""
    return []


@pytest.fixture(scope="module")
def report(sparse_folder: Path, data: Path, parts: list[EvalReport]) -> EvalReport:
    wanted = options(data, lengths=(1200, 1400))
    return evaluate(sparse_folder, wanted, QUIET, keep=parts.append)


def test_every_task_is_measured_at_every_length_on_the_same_samples(report: EvalReport) -> None:
    assert report.variants == ("dense", "sparse")
    found = [(cell.length, cell.task, tuple(cell.setting.values())) for cell in report.cells]
    for length in (1200, 1400):
        settings = [(task, setting) for own, task, setting in found if own == length]
        assert settings[:6] == [
            ("code_constant", ("1",)),
            ("code_constant", ("2",)),
            ("code_passkey", ("0",)),
            ("code_passkey", ("1",)),
            ("passkey", ("0",)),
            ("passkey", ("1",)),
        ]
        assert {task for task, _ in settings[6:]} == {"trace_counters"}
        assert ("64 or more",) in [setting for _, setting in settings[6:]]
    for cell in report.cells:
        assert set(cell.scores) == {"dense", "sparse"}
        assert set(cell.differences) == {"sparse"}
        score = cell.scores["sparse"]
        assert 0 <= score.low <= score.value <= score.high <= 1
        if cell.task in ("code_constant", "code_passkey"):
            assert 0 < cell.attended["sparse"] < 1
            assert "dense" not in cell.attended
    two_facts = next(cell for cell in report.cells if cell.setting == {"facts": "2"})
    assert (two_facts.documents, two_facts.questions) == (2, 4)


def test_what_there_is_is_kept_after_every_task_and_length(
    report: EvalReport, parts: list[EvalReport]
) -> None:
    assert len(parts) == 1 + 2 * len(TASKS_OF_EVERY_KIND)
    for earlier, later in pairwise(parts):
        assert later.cells[: len(earlier.cells)] == earlier.cells
        assert len(later.cells) + len(later.curves) > len(earlier.cells) + len(earlier.curves)
        assert later.seconds >= earlier.seconds
    assert parts[1].as_dict()["by_task"][0]["name"] == "code_constant"
    assert replace(parts[-1], seconds=report.seconds) == report


def test_text_is_measured_as_served_and_behind_a_dense_prompt(report: EvalReport) -> None:
    assert [(a.length, a.prompt) for a in report.agreements] == [
        (1200, "served"),
        (1200, "dense"),
        (1400, "served"),
        (1400, "dense"),
    ]
    for agreement in report.agreements:
        assert agreement.tokens == 2 * 49
        assert agreement.kl_mean > 0
    assert [(c.length, c.variant, c.decoded_from) for c in report.curves] == [
        (1200, "dense", 1150),
        (1200, "sparse", 1150),
        (1400, "dense", 1350),
        (1400, "sparse", 1350),
    ]


def test_the_report_is_json_and_names_its_text(report: EvalReport, data: Path) -> None:
    found = json.loads(json.dumps(report.as_dict()))
    assert found["format_version"] == 1
    assert found["variants"] == ["dense", "sparse"]
    assert found["cells"][0]["scores"]["dense"].keys() == {"value", "low", "high"}
    assert "by_document" not in found["cells"][0]
    assert found["settings"]["data"] == str(data)
    assert "api_key" not in found["settings"]
    assert f"code and text: {data}" in found["notes"]


def test_tables_show_every_cell(report: EvalReport) -> None:
    console = Console(file=io.StringIO(), width=200)
    print_report(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    for cell in report.cells:
        assert re.search(rf"{cell.task} .* {cell.length} .*{cell.questions}", text)
    assert "sparse - dense" in text
    assert "decoded text against dense" in text
    assert "loss on text" in text


def test_a_narrow_terminal_cuts_no_name_and_no_figure(report: EvalReport) -> None:
    console = Console(file=io.StringIO(), width=80)
    print_report(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert all(cell.task in text for cell in report.cells)
    assert "…" not in text


def test_what_is_not_a_terminal_is_wide(capsys: pytest.CaptureFixture[str]) -> None:
    assert result_console().width > 120


def test_plots_are_written(report: EvalReport, tmp_path: Path) -> None:
    files = plot_report(report, tmp_path / "plots")
    names = ["accuracy.png", "loss.png", "passkey.png", "code_passkey.png"]
    assert [file.name for file in files] == names
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConversionError, match="cannot be written"):
        plot_report(report, blocked)


def test_plots_without_matplotlib_say_what_to_install(
    report: EvalReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConversionError, match=r"pip install 'rtpurbo\[plot\]'"):
        plot_report(report, tmp_path)


def test_a_sparse_model_that_attends_everything_is_the_dense_one(
    tmp_path: Path, data: Path
) -> None:
    make_checkpoint("qwen3", tmp_path, section=EVERYTHING, max_position_embeddings=POSITIONS)
    found = evaluate(tmp_path, options(data), QUIET)
    for cell in found.cells:
        assert cell.differences["sparse"].value == 0
        if cell.attended:
            assert cell.attended["sparse"] == 1.0
    for agreement in found.agreements:
        assert agreement.kl_mean < 1e-6
        assert agreement.top1.value == 1.0
    dense, sparse = found.curves
    assert sparse.losses == pytest.approx(dense.losses, abs=1e-4)


def test_a_dense_model_is_measured_alone_or_against_a_teacher(
    dense_folder: Path, sparse_folder: Path, data: Path
) -> None:
    small = options(data, tasks=("code_chain", "text"))
    alone = evaluate(dense_folder, small, QUIET)
    assert alone.variants == ("dense",)
    assert alone.agreements == ()
    assert alone.cells[0].differences == {}
    taught = evaluate(
        sparse_folder,
        options(data, tasks=("code_chain", "text"), attention=("sparse",), teacher=dense_folder),
        QUIET,
    )
    assert taught.variants == ("teacher", "sparse")
    teacher = taught.cells[0].scores["teacher"]
    assert teacher == alone.cells[0].scores["dense"]
    assert taught.agreements[0].kl_mean > 0.1


def test_the_same_options_give_the_same_report(sparse_folder: Path, data: Path) -> None:
    small = options(data, tasks=("code_list", "kv"), samples=1)
    first, second = (evaluate(sparse_folder, small, QUIET).cells for _ in range(2))
    assert first == second


def test_what_has_no_room_is_left_out_and_said(sparse_folder: Path, data: Path) -> None:
    found = evaluate(sparse_folder, options(data, tasks=("code_constant",), facts=(1, 40)), QUIET)
    assert [cell.setting for cell in found.cells] == [{"facts": "1"}]
    assert "code_constant at 1200: no room for 40 facts, left out" in found.notes


def test_the_json_has_every_task_over_its_settings(report: EvalReport) -> None:
    """A reader of the JSON has no scores by document, which an average's interval is made of."""
    found = {(line["name"], line["length"]): line for line in report.as_dict()["by_task"]}
    assert set(found) == {(cell.task, cell.length) for cell in report.cells}
    for (task, length), line in found.items():
        expected = task_average(task, length, report.cells).scores
        assert line["scores"] == {name: asdict(score) for name, score in expected.items()}
