"""`rtpurbo report`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from tests.conversion.report.report_data import Page, ablations, evaluation, written


def run(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_prints_where_the_page_is(out: Path, tmp_path: Path) -> None:
    first = written(tmp_path / "first.json", evaluation(lengths=(256,)).as_dict())
    second = written(tmp_path / "second.json", evaluation(lengths=(512,)).as_dict())
    parts = written(tmp_path / "ablations.json", ablations({"sparse": evaluation()}))
    code, text, error = run(out, "--eval", first, "--eval", second, "--ablations", parts)
    assert (code, error) == (0, "")
    assert Path(text.strip()) == out / "report" / "report.html"
    page = Page(Path(text.strip()))
    assert {row[2] for row in page.cells("accuracy")} == {"256", "512"}


@pytest.mark.parametrize("flag", ["--eval", "--ablations"])
@pytest.mark.parametrize("content", [None, "", "[1]", '{"a": 1}'])
def test_a_bad_file_is_one_line_and_the_old_report_stays(
    flag: str, content: str | None, out: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    before = (out / "report" / "report.html").read_bytes()
    code, text, error = run(out, flag, path)
    assert (code, text) == (1, "")
    assert str(path) in error
    assert len(error.strip().splitlines()) == 1
    assert (out / "report" / "report.html").read_bytes() == before


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    code, text, error = run(tmp_path / "nowhere")
    assert (code, text) == (1, "")
    assert "nowhere: no such folder" in error
    assert len(error.strip().splitlines()) == 1
