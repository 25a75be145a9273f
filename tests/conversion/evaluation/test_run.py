"""Whole evaluations of tiny random models, their tables and plots, and what is refused."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from conversion.errors import ConversionError
from conversion.evaluation.options import GROUPS, TASKS, EvalOptions
from conversion.evaluation.plots import plot_report
from conversion.evaluation.report import Cell, EvalReport, averages, task_average
from conversion.evaluation.ruler.tasks import RULER_TASKS
from conversion.evaluation.run import evaluate
from conversion.evaluation.tables import print_report, result_console
from tests.engine.model.tiny_models import make_checkpoint

QUIET = Console(file=io.StringIO())
POSITIONS = 2048
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
TASKS_OF_EVERY_KIND = ("code_constant", "code_passkey", "passkey", "trace_counters", "text")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = (f"value_{i} = compute({i}, {i * i})\n" for i in range(2000))
    (folder / "source.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def sparse_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sparse"
    make_checkpoint("qwen3", folder, section=SECTION, max_position_embeddings=POSITIONS)
    return folder


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    make_checkpoint("llama", folder, max_position_embeddings=POSITIONS)
    return folder


def options(text: Path, **values: Any) -> EvalOptions:
    small: dict[str, Any] = {
        "tasks": TASKS_OF_EVERY_KIND,
        "lengths": (1200,),
        "samples": 2,
        "facts": (1, 2),
        "depths": (0.0, 1.0),
        "text_samples": 2,
        "decoded": 50,
        "data": text,
    }
    return EvalOptions(**{**small, **values})


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


def test_servers_are_compared_on_the_same_samples(dense_folder: Path, data: Path) -> None:
    asked: dict[str, set[str]] = {"good": set(), "bad": set()}

    def handler(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        asked[request.url.host].add(body["prompt"])
        name = re.search(r"assert (\w+) == $", body["prompt"])
        assert name is not None
        value = re.search(rf"^{name[1]} = (\d+)$", body["prompt"], re.MULTILINE)
        assert value is not None
        text = value[1] if request.url.host == "good" else "12"
        return httpx.Response(200, json={"choices": [{"text": text}]})

    found = evaluate(
        dense_folder,
        options(
            data,
            tasks=("code_constant",),
            urls=("bad=http://bad", "good=http://good/v1"),
            url_model="m",
            api_key="secret",
        ),
        QUIET,
        httpx.MockTransport(handler),
    )
    assert found.variants == ("bad", "good")
    assert [cell.differences["good"].value for cell in found.cells] == [1.0, 1.0]
    assert asked["good"] == asked["bad"]
    assert len(asked["good"]) == 2 + 4
    assert "secret" not in json.dumps(found.as_dict())


def test_what_has_no_room_is_left_out_and_said(sparse_folder: Path, data: Path) -> None:
    found = evaluate(sparse_folder, options(data, tasks=("code_constant",), facts=(1, 40)), QUIET)
    assert [cell.setting for cell in found.cells] == [{"facts": "1"}]
    assert "code_constant at 1200: no room for 40 facts, left out" in found.notes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ("niah",)}, "unknown task 'niah'; known: ruler, code"),
        ({"tasks": ()}, "tasks: none is given"),
        ({"lengths": ()}, "lengths must be positive"),
        ({"lengths": (700, 0)}, "lengths must be positive"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"facts": (0,)}, "facts must be positive"),
        ({"depths": (1.5,)}, "depths must be from 0 to 1"),
        ({"decoded": 1200}, "decoded must be less than every length"),
        ({"attention": ("dense", "dense")}, "the same one is named twice"),
        ({"urls": ("http://a",)}, "trace_counters needs the model in process"),
        ({"urls": ("http://a",), "attention": ("dense",)}, "belong to a model in process"),
        (
            {"urls": ("x=http://a", "x=http://b"), "tasks": ("kv",)},
            "the same name twice; give NAME=URL",
        ),
        ({"tasks": ("code_frequent",), "facts": (25,)}, "at most 24 for code_frequent"),
    ],
)
def test_impossible_options_are_refused(data: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        options(data, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lengths": (POSITIONS + 1,)}, f"length 2049 is beyond the model's {POSITIONS} tokens"),
        ({"attention": ("sparse",)}, "has no sparse attention to measure"),
        ({"data": Path("/nowhere")}, "no such file or folder"),
        ({"tasks": ("niah_single_2",), "haystack": Path("/nowhere")}, "no such file or folder"),
        ({"tasks": ("code_list",), "lengths": (60,), "decoded": 9}, "60 is too short for 1 facts"),
        ({"tasks": ("text",), "text_samples": 500}, "too little text"),
        ({"device": "cuda:7"}, "device cuda:7 is not there"),
    ],
)
def test_what_does_not_suit_the_model_is_refused(
    dense_folder: Path, data: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        evaluate(dense_folder, options(data, **values), QUIET)


def test_a_teacher_with_other_words_is_refused(
    dense_folder: Path, data: Path, tmp_path: Path
) -> None:
    make_checkpoint("llama", tmp_path, vocab_size=330)
    with pytest.raises(ConversionError, match="its vocabulary has 330 tokens"):
        evaluate(dense_folder, options(data, teacher=tmp_path), QUIET)


def test_groups_hold_tasks_once_and_are_resolved() -> None:
    for members in GROUPS.values():
        assert set(members) <= set(TASKS)
    selected = EvalOptions(tasks=("kv", "code", "code_list", "kv")).selected()
    assert selected == ("kv", *GROUPS["code"])


def cell(task: str, right: int, setting: dict[str, str] | None = None) -> Cell:
    """Ten documents of one question, `right` of which are answered; all of them by "dense"."""
    scores = {"dense": [(1.0,)] * 10, "sparse": [(float(n < right),) for n in range(10)]}
    return Cell.of(task, 4096, setting or {}, scores)


def test_a_task_counts_once_however_many_settings_it_has() -> None:
    cells = [
        cell("code_list", 2, {"facts": "1"}),
        cell("code_list", 4, {"facts": "4"}),
        cell("code_chain", 9),
    ]
    assert task_average("code_list", 4096, cells).scores["sparse"].value == pytest.approx(0.3)
    code, retrieval = averages(cells)
    assert (code.name, code.tasks) == ("code", ("code_list", "code_chain"))
    assert code.scores["sparse"].value == pytest.approx(0.6)
    assert code.differences["sparse"].value == pytest.approx(-0.4)
    assert code.differences["sparse"].high < 0
    assert (retrieval.name, retrieval.scores) == ("retrieval", code.scores)


def test_retrieval_is_what_stands_in_the_text() -> None:
    tasks = ("cwe", "niah_single_1", "vt", "kv", "passkey", "code_frequent", "trace_counters")
    found = {line.name: line.tasks for line in averages([cell(task, 5) for task in tasks])}
    assert found["retrieval"] == ("niah_single_1", "vt", "kv", "passkey")
    assert found["ruler"] == ("cwe", "niah_single_1", "vt")


def test_rulers_columns_weigh_its_variants_together() -> None:
    """Three single and three multi-key tasks are one column each, as in the paper's tables."""
    cells = [cell(task, 10 if task.startswith("niah_single") else 3) for task in RULER_TASKS]
    found = {line.name: line for line in averages(cells)}
    assert found["ruler"].scores["sparse"].value == pytest.approx((3 + 8 * 0.3) / 11)
    columns = found["ruler, columns of the paper"]
    assert columns.tasks == ("S", "mK", "mV", "mQ", "VT", "CWE", "FWE")
    assert columns.scores["sparse"].value == pytest.approx((1 + 6 * 0.3) / 7)


def test_the_json_has_every_task_over_its_settings(report: EvalReport) -> None:
    """A reader of the JSON has no scores by document, which an average's interval is made of."""
    found = {(line["name"], line["length"]): line for line in report.as_dict()["by_task"]}
    assert set(found) == {(cell.task, cell.length) for cell in report.cells}
    for (task, length), line in found.items():
        expected = task_average(task, length, report.cells).scores
        assert line["scores"] == {name: asdict(score) for name, score in expected.items()}
