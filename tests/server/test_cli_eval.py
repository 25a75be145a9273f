"""`rtpurbo eval` prints what it measured whatever happens to the plots, and reads key files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conversion.evaluation.options import EvalOptions
from conversion.evaluation.report import Cell, EvalReport, task_averages
from conversion.evaluation.run import Keep
from server.cli import app

CELLS = (Cell.of("kv", 4096, {}, {"dense": [(1.0,)] * 4, "sparse": [(0.75,)] * 4}),)
REPORT = EvalReport("tiny", ("dense", "sparse"), {}, (), CELLS, by_task=task_averages(CELLS))


def run(*flags: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["eval", *map(str, flags)])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[EvalOptions]:
    """The options of every evaluation; each finds `REPORT` at once."""
    seen: list[EvalOptions] = []

    def evaluate(model: Path, options: EvalOptions, *_: Any, keep: Keep) -> EvalReport:
        seen.append(options)
        keep(REPORT)
        return REPORT

    monkeypatch.setattr("conversion.evaluation.run.evaluate", evaluate)
    return seen


@pytest.mark.usefixtures("asked")
def test_without_matplotlib_the_results_come_before_the_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of measuring were lost to a missing library."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, printed, error = run("--plots", tmp_path / "plots", "--json")
    assert code == 1
    assert json.loads(printed)["cells"][0]["scores"]["sparse"]["value"] == 0.75
    assert error.count("\n") == 1
    assert "pip install 'rtpurbo[plot]'" in error


@pytest.mark.usefixtures("asked")
def test_what_is_measured_is_written_to_a_file_too(tmp_path: Path) -> None:
    code, printed, _ = run("--out", tmp_path / "eval.json", "--json")
    assert code == 0
    assert json.loads((tmp_path / "eval.json").read_text()) == json.loads(printed)


@pytest.mark.usefixtures("asked")
def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    code, _, error = run("--out", tmp_path / "none" / "eval.json")
    assert code == 1
    assert error.count("\n") == 1
    assert "eval.json" in error


@pytest.mark.usefixtures("asked")
def test_plots_that_cannot_be_written_leave_the_tables(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    code, printed, error = run("--plots", tmp_path / "file")
    assert code == 1
    assert "kv" in printed
    assert "0.75" in printed or "75.0" in printed
    assert "cannot be written" in error


def test_the_first_key_of_a_file_is_used(asked: list[EvalOptions], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n first \nsecond\n")
    code, _, error = run("--api-key-file", tmp_path / "keys")
    assert (code, error) == (0, "")
    assert [options.api_key for options in asked] == ["first"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"", "holds no key"),
        (b" \n\n", "holds no key"),
        (b"\xff\xfe", "cannot read"),
    ],
    ids=["missing", "empty", "blank", "not-text"],
)
def test_a_file_without_a_key_is_one_line(
    asked: list[EvalOptions], tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    code, _, error = run("--api-key-file", tmp_path / "keys")
    assert code == 1
    assert message in error
    assert error.count("\n") == 1
    assert not asked
